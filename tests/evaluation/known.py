"""Metrics whose numbers are known without a network, and frames of one colour."""

from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image

from lego_pipeline.evaluation.metrics.base import Frame, Sample


class Brightness:
    """How near the mean brightness of two frames is, in levels; counts the frames it is asked about."""

    name, title, higher_is_better, unit = "brightness", "Brightness", False, ""
    definition, reads = "difference of mean brightness", ("target",)
    weights: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.asked = 0

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        self.asked += len(generated)
        return np.array([abs(mean(a) - mean(b)) for a, b in zip(generated, target, strict=True)])


class Named:
    """Whether a frame's brightest channel is the one that the asked verb stands for; looks at no other frame."""

    name, title, higher_is_better, unit = "named", "Named", True, "%"
    definition, reads = "the verb's colour is the brightest", ("action",)
    weights: Mapping[str, str] = {}
    verbs = ("open", "close", "take")

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        seen = [int(np.asarray(frame.image).mean((0, 1)).argmax()) for frame in generated]
        return np.array([100.0 * (self.verbs[i] == s.verb) for i, s in zip(seen, samples, strict=True)])


class ColourDistance:
    """Squared distance of the mean colours of two sets, in levels."""

    name, title, higher_is_better, unit = "colour", "Colour distance", False, ""
    definition, reads = "squared distance of mean colours", ("target",)
    weights: Mapping[str, str] = {}

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        return np.array([np.asarray(frame.image, float).mean((0, 1)) for frame in frames], np.float32)

    def distance(self, generated: np.ndarray, target: np.ndarray) -> float:
        return float(np.square(generated.mean(0) - target.mean(0)).sum())


def mean(frame: Frame) -> float:
    return float(np.asarray(frame.image, float).mean())


def flat(*colour: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (16, 16), colour)
