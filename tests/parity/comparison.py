"""How near our arrays have to be to the released ones: five times what was measured, relative to the largest value.

`reference/README.md` has the measured differences (float32, CPU) and the largest values that they belong to.
"""

import re
from dataclasses import dataclass

import PIL
import torch

SAME_PILLOW = PIL.__version__.startswith("12.")  # Lanczos of other versions may round another way
FRAME = 1e-6 if SAME_PILLOW else 2 / 255
EPS, LATENT, DECODED = 5 * 3e-6 / 1.8, 5 * 4e-6 / 2.58, 5 * 1.2e-5 / 4.2
GUIDED, TRAJECTORY, CONDITION = 5 * 1e-4 / 34, 5 * 4e-4 / 120, 5 * 2e-6 / 6
LOSS, GRADIENT, SCHEDULE, ROWS = 5 * 1e-7 / 1.3, 5e-6, 1e-5, 5 * 2e-6 / 3
ROUNDED_BYTES = 0.005  # share of 8-bit values that may be one level away, where a fraction was cut off

# Limits by file and array. What is in a file and not here is an input, and shows in the outputs made from it.
LIMITS: dict[str, dict[str, float]] = {
    "0_dataset": {"eval_image_0|train_.*": FRAME, "vllm_image|vllm_text": 0.0},
    "a_conditioning": {".*_embeds|.*_out|.*_sequence": CONDITION},
    "b_unet": {"eps_.*": EPS},
    "c_latents": {"moments|concat_latent|target_moments|target_latent": LATENT, "decoded_target": DECODED},
    "d_guidance": {"sigma": SCHEDULE, "denoised_.*": GUIDED},
    "e_schedule": {".*": SCHEDULE},
    "f_sampler": {
        "sigmas": SCHEDULE,
        "x_before_each_step|denoised_each_step|final_latent": TRAJECTORY,
        "decoded|resized": DECODED,
        "output_uint8": 0.0,
    },
    "f_output": {"png": 0.0},
    "g_training": {
        "target_latent|noisy_latent|concat_latent_after_dropout": LATENT,
        "cond_sequence_after_dropout": CONDITION,
        "eps": EPS,
        "per_sample_loss": GRADIENT,
        "loss": LOSS,
        "max_abs_update_unet": 1e-4,
        "max_abs_update_projections": 0.0,  # not trained: a step would move them by the learning rate, 1e-4
    },
    "g_gradients": {"loss": LOSS, ".*grad_norm.*": GRADIENT},
    "h_ema_decay": {"decay": 1e-6},
    "vllm_features": {
        "image_feature|text_feature|teacher_forced_rows|logits_first_step": ROWS,
        "tuning_loss": GRADIENT,
        "generated_ids": 0.0,
    },
}
BY_ELEMENT = re.compile(r"betas|alphas_cumprod|model_sigmas|sigmas(_\d+)?")  # small values count as much as large ones


@dataclass(frozen=True)
class Difference:
    """Largest difference of two arrays, relative to the largest released value, and its limit."""

    relative: float
    limit: float

    @property
    def is_within(self) -> bool:
        return self.relative <= self.limit  # False for NaN


def limit_of(file: str, array: str) -> float | None:
    """Limit of an output, None for an input."""
    return next((limit for pattern, limit in LIMITS[file].items() if re.fullmatch(pattern, array)), None)


def difference(file: str, array: str, ours: torch.Tensor, released: torch.Tensor) -> Difference:
    """Compares an output with the released one.

    8-bit values may be one level away where a fraction was cut off at another place, in few places.
    """
    limit = limit_of(file, array)
    assert limit is not None, f"{file}/{array} is an input"
    if ours.shape != released.shape:
        return Difference(float("inf"), limit)
    if released.dtype == torch.uint8:
        apart = (ours.int() - released.int()).abs()
        is_rounding = apart.max() <= 1 and apart.float().mean() <= ROUNDED_BYTES
        return Difference(0.0 if is_rounding else float(apart.max()) / 255, limit)
    apart, values = (ours.double() - released.double()).abs(), released.double().abs()
    if BY_ELEMENT.fullmatch(array):
        apart = torch.where(values == 0, apart, apart / values.clamp_min(1e-12))
        return Difference(float(apart.max()), limit)
    largest = float(values.max())
    return Difference(float(apart.max()) / (largest or 1.0), limit)
