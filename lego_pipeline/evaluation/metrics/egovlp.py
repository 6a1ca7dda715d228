"""EgoVLP and EgoVLP+: how alike two frames are to a network that learnt from egocentric videos and narrations."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lego_pipeline.data.shards import content_key
from lego_pipeline.evaluation.egovlp import TextTower, VideoTower
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity, Sample


class EgoVlp:
    """Cosine of the projected video features of generated and true frame, in %.

    A clip of T frames is made of a still by repetition (4 frames for `egovlp.pth`, 16 for `epic_mir_plus.pth`). With
    context (EgoVLP+), the first half is the input frame on both sides, so every score is higher: a copied input
    scores far above zero too, and only differences between systems can be read.

    Default: the whole frame, antialiased, is squeezed to the tower's square. `parity="paper"`: the middle square after
    a resize without antialiasing, so the sides of wide frames are not seen.

    Args:
        tower, digest: the network and the key of its weights.
        parity: mode.
        cache: of features; also tells device and batch size.
        with_context: EgoVLP+.

    Source: Lai et al., ECCV 2024, section 5.1; `BolinLai/LEGO: metrics/all_metrics_in_one.py`.
    """

    higher_is_better, unit = True, "%"

    def __init__(self, tower: VideoTower, digest: str, parity: Parity, cache: FeatureCache, *, with_context: bool):
        self.name, self.title = ("egovlp_plus", "EgoVLP+") if with_context else ("egovlp", "EgoVLP")
        self.tower, self.parity, self.cache, self.with_context = tower, parity, cache, with_context
        self.reads: tuple[str, ...] = ("target", "start") if with_context else ("target",)
        self.weights: Mapping[str, str] = {"egovlp": digest}
        count = tower.video_model.num_frames
        clip = (
            f"input frame x{count // 2}, then the frame x{count - count // 2}" if with_context else f"still x{count}"
        )
        view = (
            "short side resized bilinear without antialiasing, middle square"
            if parity
            else "whole frame, bicubic with antialiasing"
        )
        self.definition = f"cosine of EgoVLP's projected video features ({clip}; {view})"

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, E), not normalised."""
        facts = (self.name, self.parity, self.weights["egovlp"], self.tower.video_model.num_frames)
        keys = [content_key(*facts, frame.digest, self.with_context and _start_digest(frame)) for frame in frames]
        answers = self.cache.answers(keys, lambda indices: self._compute([frames[i] for i in indices]), self.title)
        return np.stack(answers)

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        return 100 * cosine(self.features(generated), self.features(target))

    @torch.no_grad()
    def _compute(self, frames: Sequence[Frame]) -> np.ndarray:
        clips = torch.stack([self._clip(frame) for frame in frames])
        return self.tower(clips.to(self.cache.device)).float().cpu().numpy()

    def _clip(self, frame: Frame) -> torch.Tensor:
        """(T, 3, S, S), normalised."""
        model, own = self.tower.video_model, preprocess.unit_tensor(frame.image)
        view = preprocess.centre_without_antialiasing if self.parity else preprocess.whole_frame
        parts = [(own, model.num_frames)]
        if self.with_context and frame.start is not None:
            start = preprocess.unit_tensor(frame.start)
            if self.parity:  # as the release does it for Epic Kitchens
                own = preprocess.bilinear(own, *start.shape[-2:])
            before = model.num_frames // 2
            parts = [(start, before), (own, model.num_frames - before)]
        stills = torch.cat([view(picture, model.size).expand(count, -1, -1, -1) for picture, count in parts])
        return preprocess.normalised(stills, preprocess.IMAGENET)


class TextSimilarity:
    """Cosine of texts by EgoVLP's text tower, kept in the cache.

    Args:
        tower, digest: the network and the key of its weights.
        cache: of features.
    """

    def __init__(self, tower: TextTower, digest: str, cache: FeatureCache):
        self.tower, self.digest, self.cache = tower, digest, cache

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """(N, E), not normalised."""
        keys = [content_key("egovlp text", self.digest, text) for text in texts]
        answers = self.cache.answers(keys, lambda indices: self._compute([texts[i] for i in indices]), "text")
        return np.stack(answers)

    @torch.no_grad()
    def _compute(self, texts: Sequence[str]) -> np.ndarray:
        return self.tower(texts).float().cpu().numpy()


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) float64 of rows (N, D)."""
    first, second = (values.astype(float) / np.linalg.norm(values.astype(float), axis=1, keepdims=True)
                     for values in (first, second))  # fmt: skip
    return (first * second).sum(1)


def _start_digest(frame: Frame) -> str:
    if frame.start_digest is None:
        raise ValueError("`generated` and `target` must have the input frame for EgoVLP+; pass `start` to each Frame.")
    return frame.start_digest
