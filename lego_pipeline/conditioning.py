"""Condition dropout of training, which makes two-scale guidance possible at sampling time.

Source: original-format facts of `BolinLai/LEGO: stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`, as in
InstructPix2Pix (Brooks et al., CVPR 2023, section 3.2.1).
"""

import torch


def drop_conditions(
    condition: torch.Tensor,
    null_condition: torch.Tensor,
    image_latents: torch.Tensor,
    draws: torch.Tensor,
    probability: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces conditions by their nulls: one uniform draw per sample decides about text, image or both.

    Draws in [0, p) lose text and both VLM parts together, [p, 2p) these and the image, [2p, 3p) the image only.

    Args:
        condition: (B, L, C) float, whole condition sequences.
        null_condition: (1 or B, L, C) float, ``[psi("") ; zeros ; zeros]``.
        image_latents: (B, c, h, w) float; the null image is the zero latent.
        draws: (B,) float in [0, 1).
        probability: p in [0, 1/3].

    Returns:
        Condition and image latents after dropout, shapes unchanged.
    """
    if not 0 <= probability <= 1 / 3:
        raise ValueError(f"`probability` must be between 0 and 1/3, got {probability}.")
    draws = draws.float()
    no_text = draws < 2 * probability
    no_image = (draws >= probability) & (draws < 3 * probability)
    condition = torch.where(no_text[:, None, None], null_condition.to(condition.dtype), condition)
    return condition, torch.where(no_image[:, None, None, None], torch.zeros_like(image_latents), image_latents)
