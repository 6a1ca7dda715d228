"""Facts of the frames of a manifest, found before training: keys of their pixels and their sizes."""

import hashlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Image
from tqdm.auto import tqdm

from lego_pipeline import images
from lego_pipeline.atomic import write_atomically
from lego_pipeline.data.mirror import mirror_image
from lego_pipeline.data.shards import pixel_key

FRAMES = ("image_0", "image_1")
FACTS = pa.schema(
    [(f"pixels_{k}", pa.string()) for k in (0, 1)]
    + [("mirrored_0", pa.string())]
    + [(f"{side}_{k}", pa.int32()) for k in (0, 1) for side in ("height", "width")]
)


def read_facts(rows: Dataset, folder: Path, *, flips: bool = False) -> pa.Table:
    """What has to be known of every pair's frames before training; found once and kept in `folder`.

    Every frame has to be decoded for it, so the table is kept under a digest of the undecoded files. Processes share
    the rows, and all get the whole table.

    Args:
        rows: of a manifest.
        folder: of the kept tables.
        flips: whether keys of the mirrored frames are needed.

    Returns:
        One row per pair with the columns of `FACTS`: keys of the frames' pixels, of the mirrored input frame's (empty
        without flips), and the frames' sizes.

    Raises:
        ValueError: a row without a target frame, or with a frame that can't be read.
    """
    state = PartialState()
    share = rows.select_columns(["id", *FRAMES]).select(range(state.process_index, len(rows), state.num_processes))
    ids = share.select_columns(["id"])
    undecoded = share.cast_column("image_0", Image(decode=False)).cast_column("image_1", Image(decode=False))
    digest = hashlib.sha256(str(flips).encode())
    for row in undecoded:
        for name in FRAMES:
            if row[name] is None:
                raise ValueError(f"`data` must have both frames in every row, {row['id']!r} lacks {name}; remove it.")
            with _naming(row["id"]):
                file = row[name]
                digest.update(Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"])
    memo = folder / f"frames-{digest.hexdigest()[:32]}.parquet"
    if not memo.exists():
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(range(len(share)), desc="read frames", disable=not state.is_main_process, mininterval=5)
        found = []
        for i in bar:
            with _naming(ids[i]["id"]):
                found.append(_facts_of(share[i], flips))
        table = pa.Table.from_pylist(found, FACTS)
        write_atomically(memo, lambda path: pq.write_table(table, path))
    parts: list[pa.Table] = gather_object([pq.read_table(memo)])
    starts = [0, *accumulate(len(part) for part in parts)]
    order = [starts[i % len(parts)] + i // len(parts) for i in range(len(rows))]
    return pa.concat_tables(parts).take(order).combine_chunks()


@contextmanager
def _naming(row_id: str) -> Generator[None]:
    """Names the row whose frame can't be read."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(
            f"`data` must hold images that can be read, row {row_id!r} has one that can't ({error}); put the whole "
            "file there, or remove the row."
        ) from error


def _facts_of(row: Mapping[str, Any], flips: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"mirrored_0": ""}
    for k, name in enumerate(FRAMES):
        frame = read_frame(row[name])
        facts |= {f"pixels_{k}": pixel_key(frame), f"height_{k}": frame.height, f"width_{k}": frame.width}
        if flips and k == 0:
            facts["mirrored_0"] = pixel_key(mirror_image(frame))
    return facts


def read_frame(image: Any) -> PIL.Image.Image:
    """A frame of a manifest as upright RGB."""
    return images.to_pil(images.to_frames(image)[0])


def common_size(facts: Sequence[pa.Table], resolution: int, factor: int) -> tuple[tuple[int, int], int]:
    """(height, width) at which the model sees most input frames, and how many pairs have another one.

    Args:
        facts: of every data set.
        resolution: side in pixels of the square whose area is trained at.
        factor: pixels per latent cell.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for table in facts:
        own = Counter(zip(table["height_0"].to_pylist(), table["width_0"].to_pylist(), strict=True))
        for (height, width), count in own.items():
            sizes[images.model_size(height, width, resolution, factor)] += count
    size, count = sizes.most_common(1)[0]
    return size, sizes.total() - count


def centre_crop(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Largest window (x0, y0, x1, y1), fractions of a frame, that has the aspect of `size` = (height, width)."""
    aspect = size[1] / size[0] * height / width  # of the window, in fractions
    x, y = min(1.0, aspect), min(1.0, 1 / aspect)
    return (1 - x) / 2, (1 - y) / 2, (1 + x) / 2, (1 + y) / 2
