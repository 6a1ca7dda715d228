"""Metrics by name, in two modes: as they should be computed, and with `parity="paper"` as the paper's code does it.

`METRICS` says what each needs, `open_metrics` opens those whose weights are there and names the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics.base import Metric, Missing, Parity
from lego_pipeline.evaluation.metrics.weights import FOLDER, WEIGHTS, check_names, find, how_to_get
from lego_pipeline.loading import check_device

EVAL, KITCHEN = 'pip install "lego-pipeline[eval]"', 'pip install "lego-pipeline[kitchen]"'


class Opener:
    """Networks that metrics share, each loaded when the first metric asks for it.

    Args:
        places: path or hub name of weights by name.
        parity: mode.
        cache: of features; also tells the device.
    """

    def __init__(self, places: Mapping[str, Path | str], parity: Parity, cache: FeatureCache):
        self.places, self.parity, self.cache = places, parity, cache

    def psnr(self) -> Metric:
        from lego_pipeline.evaluation.metrics.pixels import Psnr

        return Psnr(self.parity)

    def ssim(self) -> Metric:
        from lego_pipeline.evaluation.metrics.pixels import Ssim

        return Ssim(self.parity, self.cache)

    def lpips(self, backbone: str) -> Metric:
        from lego_pipeline.evaluation.metrics.lpips import Lpips, load_lpips

        network = load_lpips(backbone, self._file(f"lpips_{backbone}")).to(self.cache.device)
        return Lpips(backbone, network, self.parity, self.cache)

    def fid(self) -> Metric:
        from lego_pipeline.evaluation.metrics.fid import Fid, load_inception

        return Fid(load_inception(self._file("inception")).to(self.cache.device), self.parity, self.cache)

    @cached_property
    def _clip(self) -> Any:
        from lego_pipeline.evaluation.metrics.clip import ClipImage, load_clip

        model, digest = load_clip(str(self.places["clip"]))
        return ClipImage(model.to(self.cache.device), digest, self.parity, self.cache)

    def clip(self) -> Metric:
        return self._clip

    def clip_text(self) -> Metric:
        from lego_pipeline.evaluation.metrics.clip import ClipText, load_tokenizer

        return ClipText(self._clip, load_tokenizer(str(self.places["clip"])))

    @cached_property
    def _video_tower(self) -> tuple[Any, str]:
        from lego_pipeline.data.shards import model_key
        from lego_pipeline.evaluation.egovlp import load_video_tower

        tower = load_video_tower(self._file("egovlp")).to(self.cache.device)
        return tower, model_key(tower)[:12]

    def egovlp(self, *, with_context: bool) -> Metric:
        from lego_pipeline.evaluation.metrics.egovlp import EgoVlp

        return EgoVlp(*self._video_tower, self.parity, self.cache, with_context=with_context)

    @cached_property
    def _texts(self) -> Any:
        from lego_pipeline.data.shards import model_key
        from lego_pipeline.evaluation.egovlp import load_text_tower
        from lego_pipeline.evaluation.metrics.egovlp import TextSimilarity

        tower = load_text_tower(self._file("egovlp"), str(self.places["distilbert"])).to(self.cache.device)
        return TextSimilarity(tower, model_key(tower)[:12], self.cache)

    def blip(self, name: str) -> Metric:
        from lego_pipeline.evaluation.metrics.blip import BlipCaption, load_blip

        model = load_blip(name, str(self.places[name])).to(self.cache.device)
        return BlipCaption(name, model, self._texts.tower.tokenizer, self._texts, self.parity, self.cache)

    def judge(self, question: str) -> Metric:
        from lego_pipeline.evaluation.judge import load_judge
        from lego_pipeline.evaluation.metrics.judge import KitchenJudge

        return KitchenJudge(load_judge().to(self.cache.device), question, self.cache)

    @cached_property
    def _detector(self) -> tuple[Any, str]:
        from lego_pipeline.evaluation.hands import LANDMARKS, PALM, HandDetector

        folder = Path(self.places["hand_detector"])
        detector = HandDetector(folder)
        return detector, hashlib.sha256(
            b"".join((folder / name).read_bytes() for name in (PALM, LANDMARKS))
        ).hexdigest()[:12]

    def hand_detector(self, *, in_place: bool) -> Metric:
        from lego_pipeline.evaluation.metrics.hand_detector import FoundHand

        return FoundHand(*self._detector, self.cache, in_place=in_place)

    def _file(self, name: str) -> Path:
        return Path(self.places[name])


@dataclass(frozen=True)
class Entry:
    """What a metric needs and how it is opened.

    Attributes:
        make: from an `Opener`.
        weights: names in `WEIGHTS`.
        packages: modules that the core doesn't bring.
        install: the line that brings them.
    """

    make: Callable[[Opener], Metric]
    weights: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    install: str = EVAL


METRICS: dict[str, Entry] = {
    "egovlp": Entry(lambda opener: opener.egovlp(with_context=False), ("egovlp",), ("timm",)),
    "egovlp_plus": Entry(lambda opener: opener.egovlp(with_context=True), ("egovlp",), ("timm",)),
    "clip": Entry(Opener.clip, ("clip",)),
    "fid": Entry(Opener.fid, ("inception",), ("torchvision", "scipy")),
    "psnr": Entry(Opener.psnr),
    "ssim": Entry(Opener.ssim, (), ("torchmetrics",)),
    "lpips": Entry(lambda opener: opener.lpips("squeeze"), ("lpips_squeeze",), ("torchmetrics", "torchvision")),
    "lpips_vgg": Entry(lambda opener: opener.lpips("vgg"), ("lpips_vgg",), ("torchmetrics", "torchvision")),
    "lpips_alex": Entry(lambda opener: opener.lpips("alex"), ("lpips_alex",), ("torchmetrics", "torchvision")),
    "blip_b": Entry(lambda opener: opener.blip("blip_b"), ("blip_b", "egovlp", "distilbert"), ("timm",)),
    "blip_l": Entry(lambda opener: opener.blip("blip_l"), ("blip_l", "egovlp", "distilbert"), ("timm",)),
    "clip_text": Entry(Opener.clip_text, ("clip",)),
    "judge": Entry(lambda opener: opener.judge("action")),
    "judge_verb": Entry(lambda opener: opener.judge("verb")),
    "judge_noun": Entry(lambda opener: opener.judge("noun")),
    "hand_detector": Entry(
        lambda opener: opener.hand_detector(in_place=False), ("hand_detector",), ("ai_edge_litert",), KITCHEN
    ),
    "hand_place": Entry(
        lambda opener: opener.hand_detector(in_place=True), ("hand_detector",), ("ai_edge_litert",), KITCHEN
    ),
}


def open_metrics(
    names: Sequence[str] | str = "all",
    weights: Mapping[str, Path | str] | None = None,
    parity: Parity = None,
    device: str = "cpu",
    cache: Path | None = None,
    batch_size: int = 16,
) -> tuple[list[Metric], list[Missing]]:
    """The metrics that can be computed here, in the given order, and those that can't with what they lack.

    Args:
        names: keys of `METRICS`, or "all".
        weights: paths, or hub names where `WEIGHTS` knows one, by name in `WEIGHTS`; "folder" is a folder in which the
            others are looked for by their usual names.
        parity: "paper" to compute as the paper's code does.
        device: of the networks.
        cache: folder of features, so that a second run asks no network; None keeps them in memory.
        batch_size: pictures that a network is given at a time.

    Raises:
        ValueError: an unknown name, a given path where nothing is, or weights that are damaged or of another network.
    """
    weights = weights or {}
    check_names(weights)
    check_device(device)
    if parity not in (None, "paper"):
        raise ValueError(f'`parity` must be "paper" or None, got {parity!r}.')
    chosen = list(METRICS) if names == "all" else [names] if isinstance(names, str) else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in METRICS]
    if unknown:
        raise ValueError(f"`metrics` must be all or of {', '.join(METRICS)}, got {', '.join(unknown)}.")
    features = FeatureCache(cache, batch_size, device)
    found = {name: place for name in WEIGHTS if (place := find(name, weights)) is not None}
    opener = Opener(found, parity, features)
    metrics, missing = [], []
    for name in chosen:
        lacking = available(name, found)
        if lacking is None:
            metrics.append(METRICS[name].make(opener))
        else:
            missing.append(lacking)
    return metrics, missing


def available(name: str, found: Mapping[str, Path | str]) -> Missing | None:
    """None if a metric can be opened with these weights, else what it lacks.

    Args:
        name: key of `METRICS`.
        found: places of weights by name in `WEIGHTS`.
    """
    entry = METRICS[name]
    absent = [weight for weight in entry.weights if weight not in found]
    if absent:
        needs = "; ".join(" or ".join(WEIGHTS[weight].files) for weight in absent)
        return Missing(name, needs, "; ".join(how_to_get(weight) for weight in absent))
    modules = [package for package in entry.packages if find_spec(package) is None]
    if modules:
        return Missing(name, f"the package {' and '.join(modules)}", f"run `{entry.install}`")
    return None


__all__ = ["FOLDER", "METRICS", "WEIGHTS", "Entry", "Metric", "Missing", "available", "open_metrics"]
