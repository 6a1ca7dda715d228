"""Two-scale guidance: which passes of the UNet a step needs, and how they are combined.

With U = UNet(null, zero image), M = UNet(null, image) and C = UNet(condition, image) the guided prediction is
``U + s_T (C - M) + s_I (M - U)`` (Brooks et al., InstructPix2Pix, CVPR 2023, equation 3; LEGO uses s_T = 7.5 and
s_I = 1.5). Sorted by passes this is ``s_T C + (s_I - s_T) M + (1 - s_I) U``: a pass whose factor is zero is left
out, which is exact. The factors sum to one, so the same formula holds for every prediction type (noise, v, clean
latents).

Letters: B samples; C, M, U the passes, always in this order in a batch.
"""

import math
import numbers
from collections.abc import Sequence
from typing import TypeAlias

import torch

Scale: TypeAlias = float | list[float] | tuple[float, ...]
PASSES = ("C", "M", "U")


def needed_passes(guidance_scale: Scale, image_guidance_scale: Scale) -> tuple[str, ...]:
    """Passes with a factor other than zero, for any sample of the batch.

    Image scale 1 needs C and M, both scales 1 need C alone, two equal scales need C and U.

    Args:
        guidance_scale: s_T, one number or one per sample.
        image_guidance_scale: s_I, likewise.
    """
    text, image = _as_list(guidance_scale), _as_list(image_guidance_scale)
    size = max(len(text), len(image))
    needed = set()
    for s_text, s_image in zip(_repeat(text, size), _repeat(image, size), strict=True):
        factors = {"C": s_text != 0, "M": s_image != s_text, "U": s_image != 1}
        needed.update(name for name, is_needed in factors.items() if is_needed)
    return tuple(name for name in PASSES if name in needed)


def is_guided(step: int, num_steps: int, interval: Sequence[float]) -> bool:
    """Whether guidance acts in a step; outside its interval a step is the pass C alone.

    Args:
        step: 0 ... num_steps - 1, the first step has the most noise.
        num_steps: number of steps.
        interval: (start, end) in fractions of the steps; a step acts if start <= step / num_steps < end.

    Source: Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models", 2024.
    """
    start, end = interval
    return start <= step / num_steps < end


def stack_passes(
    passes: Sequence[str],
    condition: torch.Tensor,
    null_condition: torch.Tensor | None,
    image_latents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the passes of a step differ in, stacked to one batch.

    Args:
        passes: from `needed_passes`.
        condition: (B, L, C).
        null_condition: (1 or B, L, C), or None where neither M nor U is among the passes.
        image_latents: (B, c, h, w); zeros in U.

    Returns:
        conditions (len(passes) * B, L, C) and image parts (len(passes) * B, c, h, w).
    """
    conditions, image_parts = [], []
    for name in passes:
        if name == "C":
            conditions.append(condition)
        elif null_condition is None:
            raise ValueError("`null_condition` must be given where guidance is on, got None; see `encode_condition`.")
        else:
            conditions.append(null_condition.expand_as(condition))
        image_parts.append(torch.zeros_like(image_latents) if name == "U" else image_latents)
    return torch.cat(conditions), torch.cat(image_parts)


def combine(
    predictions: torch.Tensor, passes: Sequence[str], guidance_scale: Scale, image_guidance_scale: Scale
) -> torch.Tensor:
    """Guided prediction of a step.

    Args:
        predictions: (len(passes) * B, c, h, w), the passes stacked in the order C, M, U.
        passes: from `needed_passes` with the same scales.
        guidance_scale: s_T, one number or B of them.
        image_guidance_scale: s_I, likewise.

    Returns:
        (B, c, h, w).
    """
    parts = dict(zip(passes, predictions.chunk(len(passes)), strict=True))
    s_text = _as_factor(guidance_scale, predictions)
    s_image = _as_factor(image_guidance_scale, predictions)
    match tuple(parts):
        case ("C", "M", "U"):
            condition, middle, null = parts.values()
            return null + s_text * (condition - middle) + s_image * (middle - null)
        case ("C", "M"):  # s_I = 1
            return parts["M"] + s_text * (parts["C"] - parts["M"])
        case ("C", "U"):  # s_T = s_I
            return parts["U"] + s_text * (parts["C"] - parts["U"])
        case ("M", "U"):  # s_T = 0
            return parts["U"] + s_image * (parts["M"] - parts["U"])
        case _:
            return predictions


def check_scale(name: str, scale: Scale, batch_size: int) -> None:
    """Raises ValueError unless a scale is one finite number of at least zero, or one per sample."""
    values = _as_list(scale)
    if len(values) not in (1, batch_size):
        raise ValueError(f"`{name}` must be one number or one per sample ({batch_size}), got {len(values)} numbers.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
            raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}; 1 switches this guidance off.")


def scale_of_samples(scale: Scale, samples: Sequence[int]) -> Scale:
    """Scales of some samples: one number as it is, numbers per sample picked in the order of `samples`."""
    values = _as_list(scale)
    return values[0] if len(values) == 1 else [values[sample] for sample in samples]


def _as_list(scale: Scale) -> list[float]:
    return list(scale) if isinstance(scale, (list, tuple)) else [scale]


def _repeat(values: list[float], size: int) -> list[float]:
    return values * size if len(values) == 1 else values


def _as_factor(scale: Scale, like: torch.Tensor) -> float | torch.Tensor:
    if isinstance(scale, (list, tuple)):
        return torch.tensor(scale, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)
    return scale
