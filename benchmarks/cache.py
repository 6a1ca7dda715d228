"""What an embedding cache takes on disk, and what its precision costs: bytes per pair, error of the condition.

    python benchmarks/cache.py

1. Sizes: files of random states at the released sizes (256 image tokens of width 1024, 77 text states of width 5120)
   and at those of the given checkpoint, for the first action on a frame and for a further one, in MB of 10^6 bytes.
   They don't depend on the values.
2. Errors: frames and actions of the embedded pairs through a cache of each precision, all with the same descriptions.
   What the projector makes of them, against a cache in float32: |difference| / |float32|, Frobenius norms over the
   tokens of one part of the condition, mean and largest of the pairs. As a yardstick, the same quotient for the
   condition of another action on the same frame. The text of a rounded cache is read by the VLM beside rounded
   states of the frame, so both roundings are in its error.

int8 has one scale for each row of states. The large language models have a few dimensions with far larger values than
the others, which cost the others precision: the small VLM of the embedded checkpoint says nothing about that, so
measure with `--model` before keeping a large VLM's states in int8.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.config import parse_config
from lego_pipeline.data.embedding_cache import DTYPES, EmbeddingCache
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.vlm import Enhancement, family_of

RELEASED = (256, 1024, 77, 5120)  # image tokens, width of their states, text states, their width
DESCRIPTION = "My left hand reaches to the handle of the drawer, grasps it and pulls the drawer open. " * 2
PARTS = ("image part", "text part")


@dataclass(kw_only=True)
class CacheConfig:
    model: Path = KITCHEN  # LegoPipeline folder with a VLM
    pairs: int = 16  # embedded pairs for the errors
    json: Path | None = None  # also write everything measured to this file

    def __post_init__(self):
        if self.pairs < 2:
            raise ValueError(f"`pairs` must be at least 2, got {self.pairs}.")


def sizes_on_disk(shape: tuple[int, int, int, int], dtype: str) -> tuple[float, float]:
    """MB that the first action on a frame takes, and a further one, index and headers included.

    Args:
        shape: image tokens, width of their states, text states, their width.
        dtype: of the cache.
    """
    tokens, vision_dim, states, dim = shape
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cache, totals = EmbeddingCache(Path(folder), dtype=dtype), []
        cache.add_frame("frame", torch.randn(tokens, vision_dim, generator=generator))
        for number in range(2):
            cache.add_text(f"text-{number}", DESCRIPTION, torch.randn(states, dim, generator=generator))
            cache.write()
            totals.append(sum(file.stat().st_size for file in Path(folder).iterdir()))
    return totals[0] / 1e6, (totals[1] - totals[0]) / 1e6


@torch.no_grad()
def projected(pipe: LegoPipeline, enhancements: list[Enhancement]) -> dict[str, torch.Tensor]:
    """The condition's two parts that come from the VLM, each (B, tokens, C)."""
    condition, _ = pipe.encode_condition(enhancements)
    length, tokens = pipe.text_length, pipe.projector.config.num_image_tokens
    return {"image part": condition[:, length : length + tokens], "text part": condition[:, length + tokens :]}


def relative_errors(values: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """|values - truth| / |truth| of each sample."""
    return ((values - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).tolist()


def condition_errors(pipe: LegoPipeline, rows: Any) -> dict[str, dict[str, list[float]]]:
    """Errors of the condition's parts by precision, and how far the condition of another action is, per pair."""
    frames, actions = list(rows["image_0"]), list(rows["action"])
    others = [next(other for other in actions[i:] + actions if other != action) for i, action in enumerate(actions)]
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {dtype: EmbeddingCache(Path(folder) / dtype, dtype=dtype) for dtype in DTYPES}
        exact = pipe.enhance(frames, actions, cache=caches["float32"])
        descriptions = [item.description for item in exact]
        for dtype, cache in caches.items():
            parts[dtype] = projected(pipe, pipe.enhance(frames, actions, descriptions, cache=cache))
        parts["another action"] = projected(pipe, pipe.enhance(frames, others, cache=caches["float32"]))
    truth = parts.pop("float32")
    return {name: {part: relative_errors(own[part], truth[part]) for part in PARTS} for name, own in parts.items()}


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    lines = ["| MB on disk | precision | first action on a frame | further action |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['dtype']} | {row['first']:.3f} | {row['further']:.3f} |" for row in report["sizes"]
    ]
    lines += ["", f"| error of the condition, {report['pairs']} pairs | image part | text part |", "|---|---|---|"]
    for name, errors in report["errors"].items():
        columns = (f"{sum(own) / len(own):.1e} (at most {max(own):.1e})" for own in errors.values())
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(config: CacheConfig) -> dict[str, Any]:
    """Measures, prints the tables, writes `config.json`; returns what it wrote."""
    pipe = LegoPipeline.from_pretrained(config.model)
    rows = read_manifest(FRAMES)
    rows = rows.select(range(min(config.pairs, len(rows))))
    frame = family_of(pipe.vlm).frame_states(pipe.vlm, pipe.vlm_processor, [rows[0]["image_0"]])[0]
    own = (*frame.shape, pipe.projector.config.num_text_tokens, pipe.projector.config.vlm_dim)
    sizes = []
    for name, shape in {"released sizes": RELEASED, "checkpoint": own}.items():
        for dtype in DTYPES:
            first, further = sizes_on_disk(shape, dtype)
            sizes.append({"name": name, "shape": shape, "dtype": dtype, "first": first, "further": further})
    report = {"pairs": len(rows), "sizes": sizes, "errors": condition_errors(pipe, rows)}
    print(markdown(report))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main(parse_config(CacheConfig, __doc__))
