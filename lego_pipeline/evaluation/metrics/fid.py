"""FID: distance of the Gaussians that fit Inception's features of generated and true frames. One number for a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.data.shards import content_key, model_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity

SIZE = 299  # pixels along a side of what Inception sees
CLASSES = 1008  # of the classifier in the released file, which isn't used
AVERAGE_POOLS = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
MAXIMUM_POOL = "Mixed_7c"


class Fid:
    """Frechet distance of Inception's 2048 pooled features of the generated frames and of the true frames.

    Biased upwards for few frames: compare systems on the same number alone, best with more frames than features.

    Default: the whole frame to 299 pixels, bicubic with antialiasing on unrounded values and clamped, which is
    clean-fid's way. `parity="paper"`: bilinear without antialiasing inside the network, as pytorch-fid does it.

    Args:
        network: pictures (B, 3, 299, 299) in [-1, 1] -> features (B, D); `load_inception` makes it.
        parity: mode.
        cache: of features; also tells device and batch size.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NIPS 2017; Parmar et al., CVPR 2022;
    `BolinLai/LEGO: metrics/all_metrics_in_one.py`.
    """

    name, title, higher_is_better, unit = "fid", "FID", False, ""
    reads: tuple[str, ...] = ("target",)

    def __init__(self, network: nn.Module, parity: Parity, cache: FeatureCache):
        self.network, self.parity, self.cache = network, parity, cache
        self.weights: Mapping[str, str] = {"inception": model_key(network)[:12]}
        how = "bilinear without antialiasing" if parity else "bicubic with antialiasing (clean-fid)"
        self.definition = f"Frechet distance of Inception features (2015-12-05) of the two sets, 299 px {how}"

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, D)."""
        keys = [content_key("fid", self.parity, self.weights["inception"], frame.digest) for frame in frames]
        answers = self.cache.answers(keys, lambda indices: self._compute([frames[i] for i in indices]), "FID")
        return np.stack(answers)

    def distance(self, generated: np.ndarray, target: np.ndarray) -> float:
        """Of features (N, D) and (M, D).

        Raises:
            ValueError: fewer than two frames on a side.
        """
        return frechet_distance(generated, target)

    @torch.no_grad()
    def _compute(self, frames: Sequence[Frame]) -> np.ndarray:
        pictures = [preprocess.unit_tensor(frame.image) for frame in frames]
        resized = [preprocess.bilinear(picture, SIZE, SIZE) if self.parity else preprocess.whole_frame(picture, SIZE)
                   for picture in pictures]  # fmt: skip
        return self.network(torch.cat(resized).to(self.cache.device) * 2 - 1).float().cpu().numpy()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and sample covariances of features (N, D) and (M, D).

    With A and B the centred features, divided by the roots of N - 1 and M - 1, S1 = A'A, S2 = B'B, and the trace of
    the root is the sum of the singular values of A B'. No covariance is formed and no matrix root taken, so fewer
    frames than features are no numerical problem.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"`features` must be of at least two frames on each side, got {len(first)} and {len(second)}."
        )
    factors = []
    for features in (first, second):
        centred = (features - features.mean(0, dtype=float)) / np.sqrt(len(features) - 1)
        factors.append(np.linalg.qr(centred, mode="r") if len(features) > features.shape[1] else centred)
    one, other = factors
    between = np.square(first.mean(0, dtype=float) - second.mean(0, dtype=float)).sum()
    within = np.square(one).sum() + np.square(other).sum()
    return float(between + within - 2 * np.linalg.svd(one @ other.T, compute_uv=False).sum())


def load_inception(path: Path) -> nn.Module:
    """Inception v3 as TensorFlow trained it for FID, up to the pooled features; evaluation mode.

    Args:
        path: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, in torchvision's names.

    Raises:
        FileNotFoundError, ValueError: no such file, damaged, or of another network.
        ImportError: torchvision isn't installed.
    """
    network = build_inception()
    state = read_tensors(path)
    try:
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`inception` must be pytorch-fid's weights, got {path} ({reason}); pass "
            "pt_inception-2015-12-05-6726825d.pth."
        ) from error
    return network.eval().requires_grad_(False)


def build_inception() -> Any:
    """torchvision's Inception v3 with random weights and TensorFlow's poolings, which count no padding.

    The last block takes the maximum instead of the average, an oddity of the network that FID was defined by.
    """
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
    network.fc = nn.Identity()
    network.dropout = nn.Identity()
    average = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    maximum = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
    for name in (*AVERAGE_POOLS, MAXIMUM_POOL):
        block: Any = network.get_submodule(name)
        block._forward = partial(_repooled, block, block._forward, maximum if name == MAXIMUM_POOL else average)
    return network


def _repooled(
    block: Any, forward: Callable[..., list[torch.Tensor]], pool: Any, x: torch.Tensor
) -> list[torch.Tensor]:
    """The branches of a block of torchvision, the last of which pools, computed anew with another pooling."""
    return [*forward(x)[:-1], block.branch_pool(pool(x))]
