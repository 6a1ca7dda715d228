"""Render the kitchen as shards of a manifest.

    python -m examples.kitchen.render --pairs 20000 --split train --out DIR

writes `DIR/train-000000.parquet`, `DIR/train-000100.parquet`, ... of 100 pairs each. The same command again goes on
where it was stopped: complete shards are kept, and a shard is there complete or not at all. Pair i of a split is
the same whatever the number of pairs or of workers. One core renders about 4 pairs of 128 pixels a second.

Pairs of real videos are not all of use. `--unsuitable 0.1` spoils a tenth of the pairs in the four ways that curation
must find, and says so in their slots ("unsuitable": reason); the others stay as they are.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

SHARD = 100  # pairs
BATCH = 10  # pairs that a worker renders at a time
LARGEST_SIZE = 1024  # pixels
MOST_PAIRS = 1_000_000  # what the six digits of a shard's name can count
COLOURS = ("red", "blue", "yellow", "green", "white", "purple", "teal", "coral", "black", "steel")
UNSUITABLE = ("black frame", "blurred frame", "no hands", "near duplicate")


@dataclass(kw_only=True)
class RenderConfig:
    """Render pairs of the kitchen as manifest shards; the same command again goes on where it was stopped."""

    pairs: int  # number of pairs
    out: Path  # folder of the shards
    split: Literal["train", "val", "test"] = "train"  # settled seed, kitchens and actions
    size: int = 128  # pixels along a side of the frames
    workers: int = os.cpu_count() or 1  # processes; the result does not depend on it
    unsuitable: float = 0.0  # share of pairs that are spoilt, for curation to find

    def __post_init__(self):
        if not 1 <= self.pairs <= MOST_PAIRS:
            raise ValueError(f"`--pairs` must be 1 to {MOST_PAIRS}, got {self.pairs}.")
        if not 16 <= self.size <= LARGEST_SIZE:
            raise ValueError(f"`--size` must be 16 to {LARGEST_SIZE} pixels, got {self.size}.")
        if self.workers < 1:
            raise ValueError(f"`--workers` must be at least 1, got {self.workers}.")
        if not 0 <= self.unsuitable <= 1:
            raise ValueError(f"`--unsuitable` must be a share from 0 to 1, got {self.unsuitable}.")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"`--out` must be a folder, but {self.out} is a file; name another one.")


def row(sample: dict, split: str) -> dict:
    """Manifest row of what `scene.sample` gave (columns: `lego_pipeline.data.manifest`).

    The slots are those of the scene, the kitchen's number and, where the description names one, the thing's colour.
    """
    slots = {**sample["slots"], "kitchen": sample["kitchen"]}
    colour = next((word for word in sample["description"].split() if word in COLOURS), None)
    if colour:
        slots["colour"] = colour
    return {
        "id": f"kitchen-{split}-{sample['index']:07d}",
        "image_0": Image.fromarray(sample["before"]),
        "image_1": Image.fromarray(sample["target"]),
        "action": sample["label"],
        "verb": sample["slots"]["verb"],
        "noun": sample["slots"]["noun"],
        "description": sample["description"],
        "slots": slots,
        "boxes_0": _box_rows(sample["boxes_before"]),
        "boxes_1": _box_rows(sample["boxes_target"]),
        "video": f"kitchen-{sample['kitchen']}",
        "time_0": 0.0,
        "time_1": 1.0,
        "split": split,
        "source": "rendered kitchen",
        "licence": "Apache-2.0",
    }


def render_rows(split: str, indices: range, size: int, unsuitable: float = 0.0) -> list[dict]:
    """Render the pairs `indices` of a split; `unsuitable` is the share that is spoilt."""
    from .scene import SPLITS, sample

    settled = SPLITS[split]
    rows = []
    for index in indices:
        rng = np.random.default_rng([settled.seed, index, len(UNSUITABLE)])
        reason = UNSUITABLE[int(rng.integers(len(UNSUITABLE)))]
        is_spoilt = rng.random() < unsuitable
        pair = sample(
            settled.seed,
            index,
            size=size,
            kitchens=settled.kitchens,
            first_kitchen=settled.first_kitchen,
            actions=settled.actions,
            show_hands=not (is_spoilt and reason == "no hands"),
        )
        if is_spoilt:
            _spoil(pair, reason, rng)
        rows.append(row(pair, split))
    return rows


def render(config: RenderConfig) -> int:
    """Render what is missing and return the number of shards written.

    Raises:
        ValueError: the folder holds shards of another size or share of unsuitable pairs.
    """
    from tqdm import tqdm

    from lego_pipeline.data.manifest import write_shard

    config.out.mkdir(parents=True, exist_ok=True)
    _claim(config)
    for unfinished in config.out.glob(f".{config.split}-*.parquet.*.tmp"):
        unfinished.unlink()
    shards = [range(first, min(first + SHARD, config.pairs)) for first in range(0, config.pairs, SHARD)]
    missing = [shard for shard in shards if not _is_complete(_shard_path(config, shard), len(shard))]
    done = config.pairs - sum(map(len, missing))
    batches = [shard[start : start + BATCH] for shard in missing for start in range(0, len(shard), BATCH)]
    ends = {shard.stop: shard for shard in missing}
    rows: list[dict] = []
    with (
        tqdm(total=config.pairs, initial=done, desc=f"kitchen {config.split}", unit="pair") as bar,
        _Workers(config.workers) as workers,
    ):
        jobs = [(config.split, batch, config.size, config.unsuitable) for batch in batches]
        for batch, result in zip(batches, workers.map(render_rows, jobs), strict=True):
            rows += result
            bar.update(len(batch))
            if batch.stop in ends:
                write_shard(rows, _shard_path(config, ends[batch.stop]))
                rows = []
    return len(missing)


class _Workers:
    """Calls a function in this process or, in order, in several fresh ones."""

    def __init__(self, count: int):
        self.executor = None
        if count > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: a worker is one core
            self.executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker)

    def map(self, function, arguments: list[tuple]):
        if self.executor is None:
            return (function(*values) for values in arguments)
        return self.executor.map(function, *zip(*arguments, strict=True)) if arguments else iter(())

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    parent = parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _shard_path(config: RenderConfig, shard: range) -> Path:
    return config.out / f"{config.split}-{shard.start:06d}.parquet"


def _is_complete(path: Path, pairs: int) -> bool:
    """Whether a shard is there with at least that many pairs."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        return path.is_file() and pq.read_metadata(path).num_rows >= pairs
    except ArrowInvalid:
        return False


def _claim(config: RenderConfig) -> None:
    """Note in the folder how its shards are rendered, or check that they are to be rendered alike."""
    path = config.out / f".{config.split}.json"  # hidden from datasets.load_dataset
    settings = {"size": config.size, "unsuitable": config.unsuitable}
    if not path.exists():
        path.write_text(json.dumps(settings))
        return
    there = json.loads(path.read_text())
    if there != settings:
        raise ValueError(
            f"`--out` {config.out} holds {config.split} pairs with size {there['size']} and unsuitable "
            f"{there['unsuitable']}, got size {config.size} and unsuitable {config.unsuitable}; name another folder."
        )


def _spoil(pair: dict, reason: str, rng: np.random.Generator) -> None:
    """Make a rendered pair unsuitable (the hands of "no hands" are left out when it is rendered)."""
    pair["slots"]["unsuitable"] = reason
    frame = ("before", "target")[int(rng.integers(2))]
    if reason == "black frame":
        pair[frame] = (pair[frame] * 0.02).astype(np.uint8)
        pair[f"boxes_{frame}"] = {}
    elif reason == "blurred frame":
        blur = ImageFilter.GaussianBlur(len(pair[frame]) / 20)
        pair[frame] = np.asarray(Image.fromarray(pair[frame]).filter(blur))
    elif reason == "near duplicate":
        noise = rng.integers(-1, 2, pair["before"].shape)
        pair["target"] = np.clip(pair["before"] + noise, 0, 255).astype(np.uint8)
        pair["boxes_target"] = pair["boxes_before"]


def _box_rows(boxes: dict[str, list[float]]) -> list[dict]:
    """Boxes by name as the manifest's list."""
    return [{"name": name, "x0": x0, "y0": y0, "x1": x1, "y1": y1} for name, (x0, y0, x1, y1) in boxes.items()]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from lego_pipeline.config import parse_config

    config = parse_config(RenderConfig, arguments=arguments)
    try:
        from . import scene  # noqa: F401 (says before any work when embreex is missing)

        render(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; complete shards are kept, and the same command goes on with the rest.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
