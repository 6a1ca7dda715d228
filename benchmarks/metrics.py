"""How much faster metrics are in batches than picture by picture, and that both give the same features.

    python benchmarks/metrics.py --device cuda --frames 256 --batch-size 32

Networks of the released sizes, with random weights, as speed doesn't depend on them; the judge has its own. Frames
are the embedded target frames, again and again, each a little brighter than before, as PNG files in memory: reading
and resizing are part of what is measured. The released metrics see one picture at a time.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageEnhance
import torch
from transformers import CLIPConfig, CLIPModel

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.egovlp import SpaceTimeTransformer, VideoTower
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.judge import load_judge
from lego_pipeline.evaluation.metrics.base import Frame
from lego_pipeline.evaluation.metrics.clip import ClipImage
from lego_pipeline.evaluation.metrics.egovlp import EgoVlp
from lego_pipeline.evaluation.metrics.fid import Fid, build_inception
from lego_pipeline.evaluation.metrics.judge import KitchenJudge
from lego_pipeline.loading import check_device

LARGEST_DIFFERENCE = 1e-5  # of the largest feature


@dataclass(kw_only=True)
class MetricsConfig:
    metrics: tuple[str, ...] = ("judge", "fid", "egovlp", "clip")
    frames: int = 32
    batch_size: int = 16
    device: str = "cpu"
    json: Path | None = None  # also write everything measured to this file

    def __post_init__(self):
        check_device(self.device)
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"`metrics` must be of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}.")
        if min(self.frames, self.batch_size) < 1:
            raise ValueError("`frames` and `batch_size` must be at least 1.")


def _judge(cache: FeatureCache) -> Any:
    return KitchenJudge(load_judge().to(cache.device), "action", cache)


def _fid(cache: FeatureCache) -> Any:
    return Fid(build_inception().eval().requires_grad_(False).to(cache.device), None, cache)


def _egovlp(cache: FeatureCache) -> Any:
    model = SpaceTimeTransformer(size=224, patch=16, dim=768, depth=12, num_heads=12, hidden=3072, num_frames=4)
    tower = VideoTower(model, 256).eval().requires_grad_(False).to(cache.device)
    return EgoVlp(tower, "random", None, cache, with_context=False)


def _clip(cache: FeatureCache) -> Any:
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    return ClipImage(model.eval().requires_grad_(False).to(cache.device), "random", None, cache)


METRICS: dict[str, Callable[[FeatureCache], Any]] = {"judge": _judge, "fid": _fid, "egovlp": _egovlp, "clip": _clip}


def make_frames(count: int) -> list[Frame]:
    """Encoded frames, no two of them equal."""
    rows = read_manifest(FRAMES)
    frames = []
    for i in range(count):
        row = rows[i % len(rows)]
        data = io.BytesIO()
        PIL.ImageEnhance.Brightness(row["image_1"]).enhance(1 + 0.1 * (i // len(rows))).save(data, "PNG")
        frames.append(Frame(data.getvalue(), row["image_0"]))
    return frames


def measure(name: str, frames: list[Frame], batch_size: int, device: str) -> dict[str, Any]:
    """Frames per second one by one and in batches, and how far apart the features are, as a share of the largest."""
    torch.manual_seed(0)
    metric = METRICS[name](FeatureCache(None, batch_size, device))
    metric.features(frames[:1])  # once before the clock
    rates, features = [], []
    for size in (1, batch_size):
        metric.cache = FeatureCache(None, size, device)
        start = time.perf_counter()
        features.append(metric.features(frames))
        rates.append(len(frames) / (time.perf_counter() - start))
    difference = float(np.abs(features[0] - features[1]).max() / np.abs(features[0]).max())
    if difference > LARGEST_DIFFERENCE:
        raise ValueError(f"batches must give what single pictures give, {name} differs by {difference:.1e}.")
    return {"metric": name, "single": rates[0], "batched": rates[1], "speedup": rates[1] / rates[0],
            "difference": difference}  # fmt: skip


def main(config: MetricsConfig) -> None:
    frames = make_frames(config.frames)
    measured = [measure(name, frames, config.batch_size, config.device) for name in config.metrics]
    print(
        f"{config.frames} frames on {config.device}, {torch.get_num_threads()} threads, batches of {config.batch_size}"
    )
    print("| metric | one by one, frames/s | in batches | speed-up | difference |", "|---|---|---|---|---|", sep="\n")
    for row in measured:
        print("| {metric} | {single:.2f} | {batched:.2f} | {speedup:.2f} x | {difference:.0e} |".format(**row))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    run(main, MetricsConfig, __doc__)
