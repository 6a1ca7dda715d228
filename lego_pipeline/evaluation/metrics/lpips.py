"""LPIPS: distance of two frames in the layers of a network that learnt to classify photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.data.shards import content_key, model_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity, Sample


class Lpips:
    """Learned perceptual distance x 100, for each frame, by one of three backbones.

    `lpips` is by SqueezeNet, which the paper's table presumably shows; `lpips_vgg` and `lpips_alex` are beside it.
    Default: values in [-1, 1], as the network expects, and antialiased resizing where sizes differ. `parity="paper"`:
    values in [0, 1], which halves the contrast and usually the distance; comparable with the paper and nothing else.

    Args:
        backbone: "squeeze", "vgg" or "alex".
        network: of `load_lpips`.
        parity: mode.
        cache: of scores; also tells device and batch size.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, linear
    heads v0.1, which lie in torchmetrics; `BolinLai/LEGO: metrics/all_metrics_in_one.py`.
    """

    higher_is_better, unit = False, "%"
    reads: tuple[str, ...] = ("target",)

    def __init__(self, backbone: str, network: nn.Module, parity: Parity, cache: FeatureCache):
        self.name, self.title = {
            "squeeze": ("lpips", "LPIPS"),
            "vgg": ("lpips_vgg", "LPIPS (VGG)"),
            "alex": ("lpips_alex", "LPIPS (AlexNet)"),
        }[backbone]
        self.network, self.parity, self.cache = network, parity, cache
        self.weights: Mapping[str, str] = {f"lpips_{backbone}": model_key(network)[:12]}
        values = "[0, 1] where the network expects [-1, 1]" if parity else "[-1, 1]"
        self.definition = f"LPIPS v0.1 by {backbone} x 100, values in {values}"

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        facts = (self.name, self.parity, dict(self.weights))
        pairs = list(zip(generated, target, strict=True))
        keys = [content_key(*facts, *(frame.digest for frame in pair)) for pair in pairs]
        answers = self.cache.answers(keys, lambda indices: self._compute([pairs[i] for i in indices]), self.title)
        return 100 * np.array(answers, float).reshape(-1)

    @torch.no_grad()
    def _compute(self, pairs: Sequence[tuple[Frame, Frame]]) -> np.ndarray:
        tensors = [preprocess.same_size(*(frame.image for frame in pair), antialias=not self.parity) for pair in pairs]
        values = np.empty(len(pairs), np.float32)
        for group in preprocess.groups_of_one_size(tensors):
            first, second = torch.stack([tensors[i] for i in group]).to(self.cache.device).unbind(1)
            values[group] = self.network(first, second, normalize=not self.parity).flatten().cpu().numpy()
        return values


def load_lpips(backbone: str, path: Path) -> nn.Module:
    """The network in evaluation mode: a backbone as torchvision saves it, and torchmetrics' heads.

    Args:
        backbone: "squeeze", "vgg" or "alex".
        path: torchvision's file of the whole classifier, or of its `features`.

    Raises:
        FileNotFoundError, ValueError: no such file, damaged, or of another network.
        ImportError: torchmetrics or torchvision isn't installed.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    state = {name.removeprefix("features."): value for name, value in read_tensors(path).items()
             if not name.startswith("classifier.")}  # fmt: skip
    network = _LPIPS(
        net=cast(Literal["alex", "vgg", "squeeze"], backbone), pnet_rand=True
    )  # random, so that nothing is fetched; filled below
    try:
        network.net.load_state_dict({name: state.pop(_place(name)) for name in network.net.state_dict()})
        if state:
            raise KeyError(", ".join(sorted(state)[:4]))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`lpips_{backbone}` must be torchvision's weights of {backbone}, got {path} ({reason}); pass the file "
            "that the message about missing weights names."
        ) from error
    return network.eval().requires_grad_(False)


def _place(name: str) -> str:
    """Name in torchvision's `features` of a weight in a slice: "slices.1.3.squeeze.bias" -> "3.squeeze.bias"."""
    parts = name.split(".")
    return ".".join(parts[2:] if parts[0] == "slices" else parts[1:])
