"""PSNR and SSIM: no weights, one number for each pair of a generated and a true frame of the same size."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lego_pipeline.data.shards import content_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity, Sample

# Mean squared error that rounding to 8 bit alone makes, values in [0, 1]: no stored frame can be known to be closer.
ROUNDING_ERROR = 1 / 12 / 255**2
CEILING = -10 * math.log10(ROUNDING_ERROR)  # dB, 58.92


class Psnr:
    """Peak signal-to-noise ratio in dB of values in [0, 1], for each frame; the table's value is the mean of dB.

    Default: frames of another size are brought to the target's with antialiasing, and an exact copy counts as
    `CEILING`, the noise of rounding to 8 bit, so that a mean exists. `parity="paper"`: bilinear without antialiasing,
    and an exact copy is infinite. (The released code's mean is then infinite too; here such frames are left out of
    means, and counted.)

    Source: `BolinLai/LEGO: metrics/all_metrics_in_one.py`, torchmetrics' PSNR with data range 1.
    """

    name, title, higher_is_better, unit = "psnr", "PSNR", True, "dB"
    reads: tuple[str, ...] = ("target",)
    weights: Mapping[str, str] = {}

    def __init__(self, parity: Parity):
        self.parity = parity
        exact = "infinite, and left out of the mean" if parity else f"{CEILING:.1f} dB"
        resized = "bilinear without antialiasing" if parity else "bicubic with antialiasing"
        self.definition = (
            f"mean over frames of 10 log10(1 / mean squared error) of RGB in [0, 1]; another size than the target's "
            f"is resized {resized}; an exact copy is {exact}"
        )

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        return np.array([self._score(*pair) for pair in zip(generated, target, strict=True)])

    def _score(self, generated: Frame, target: Frame) -> float:
        pair = preprocess.same_size(generated.image, target.image, antialias=not self.parity).double()
        error = float((pair[0] - pair[1]).square().mean())
        if self.parity:
            return -10 * math.log10(error) if error else math.inf
        return -10 * math.log10(max(error, ROUNDING_ERROR))


class Ssim:
    """Structural similarity of RGB in [0, 1], Gaussian window of 11 pixels and deviation 1.5, mean over the picture.

    Not in the released code; `parity="paper"` changes how frames of another size are resized, as for PSNR.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004; torchmetrics
    computes it.
    """

    name, title, higher_is_better, unit = "ssim", "SSIM", True, ""
    reads: tuple[str, ...] = ("target",)
    weights: Mapping[str, str] = {}

    def __init__(self, parity: Parity, cache: FeatureCache):
        self.parity, self.cache = parity, cache
        resized = "bilinear without antialiasing" if parity else "bicubic with antialiasing"
        self.definition = (
            "structural similarity of RGB in [0, 1], Gaussian window 11, deviation 1.5 (not in the released code); "
            f"another size than the target's is resized {resized}"
        )

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        keys = [content_key(self.name, self.parity, *(frame.digest for frame in pair))
                for pair in zip(generated, target, strict=True)]  # fmt: skip
        answers = self.cache.answers(keys, lambda indices: self._compute(generated, target, indices), "SSIM")
        return np.array(answers, float).reshape(-1)

    def _compute(self, generated: Sequence[Frame], target: Sequence[Frame], indices: Sequence[int]) -> np.ndarray:
        from torchmetrics.functional.image import structural_similarity_index_measure

        pairs = [preprocess.same_size(generated[i].image, target[i].image, antialias=not self.parity) for i in indices]
        values = np.empty(len(pairs), np.float32)
        for group in preprocess.groups_of_one_size(pairs):
            first, second = torch.stack([pairs[i] for i in group]).to(self.cache.device).unbind(1)
            scores = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
            values[group] = torch.atleast_1d(scores).cpu().numpy()
        return values
