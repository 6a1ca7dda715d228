"""Frames as the tensors that a metric's network sees. A metric is its preprocessing, so each way has a name.

Default (`whole_frame`): the whole frame, its aspect ignored, bicubic with antialiasing on unrounded values, clamped.
Hands come in from the sides and from below, so nothing is cut off; without antialiasing a small picture shows
sampling errors (Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022).

The released code (`BolinLai/LEGO: metrics/all_metrics_in_one.py`) resizes tensors without antialiasing:
`squeezed_without_antialiasing` for CLIP, `bilinear` for FID and for frames of another size than their target,
`centre_without_antialiasing` for EgoVLP.

Letters: B frames, S side of what a network sees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from lego_pipeline import images


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, by which values in [0, 1] are normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def unit_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def whole_frame(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1] of (B, 3, H, W): the whole frame, antialiased."""
    return images.resize(frames, size, size)


def squeezed_without_antialiasing(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, S, S), not clamped: the whole frame, bicubic, as the released code resizes it for CLIP."""
    return functional.interpolate(frames, (size, size), mode="bicubic", align_corners=False)


def centre_without_antialiasing(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1]: short side to S, bilinear, then the middle, as the released code does it for EgoVLP."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    resized = bilinear(frames, int(size * height / short), int(size * width / short))
    height, width = resized.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[..., top : top + size, left : left + size]


def squeezed_by_pillow(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """(1, 3, S, S) in [0, 1]: the whole frame, bicubic with antialiasing, rounded to 8 bit, as BLIP has it."""
    return unit_tensor(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


def normalised(frames: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """(B, 3, S, S) in [0, 1] with the statistics' mean taken off and divided by their deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (frames - mean) / std


def same_size(generated: PIL.Image.Image, target: PIL.Image.Image, *, antialias: bool) -> torch.Tensor:
    """(2, 3, H, W) in [0, 1]: a generated frame, brought to its target's size if need be, and the target.

    Args:
        generated, target: RGB.
        antialias: bicubic with antialiasing, clamped; otherwise bilinear without, as the released code does it.
    """
    first, second = unit_tensor(generated), unit_tensor(target)
    height, width = second.shape[-2:]
    resized = images.resize(first, height, width) if antialias else bilinear(first, height, width)
    return torch.cat([resized, second])


def bilinear(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 3, H, W) brought to another size without antialiasing."""
    if frames.shape[-2:] == (height, width):
        return frames
    return functional.interpolate(frames, (height, width), mode="bilinear", align_corners=False)


def groups_of_one_size(pairs: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions of the tensors that have one shape, so that each group can be stacked."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.shape), []).append(i)
    return list(groups.values())
