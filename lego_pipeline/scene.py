"""The scene stays: pixels of the input frame are kept where the generated latents hardly differ from its own.

An autoencoder blurs what it passes on, also the part of the frame that the action leaves alone. Where the latents of
the result are nearly those of the input, the input's own pixels are shown instead of decoded ones, with a soft border.
Where the camera moves, all cells change and nothing is kept. The paper has nothing of this kind.

Letters: N images, c latent channels, h, w latent size, H, W image size in pixels.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


def changed_share(latents: torch.Tensor, image_latents: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """How much of a cell is new: 0 up to the first threshold, 1 from the second on, linear between.

    A cell's distance is the root mean square over channels of the difference, in units of the standard deviation of
    the input frame's latents.

    Args:
        latents: (N, c, h, w) generated, not multiplied by the scaling factor.
        image_latents: (N, c, h, w) of the input frames, not multiplied either.
        thresholds: two distances, the first smaller.

    Returns:
        (N, 1, h, w) float32 in [0, 1].
    """
    low, high = thresholds
    distance = (latents.float() - image_latents.float()).square().mean(1, keepdim=True).sqrt()
    spread = image_latents.float().flatten(1).std(1).clamp_min(1e-6)
    return ((distance / spread[:, None, None, None] - low) / (high - low)).clamp(0, 1)


def keep_scene_pixels(image: torch.Tensor, frame: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The generated image where it is new and the input frame elsewhere.

    Args:
        image, frame: (3, H, W) float in [0, 1].
        share: (1, h, w) from `changed_share`.

    Returns:
        (3, H, W) float in [0, 1].
    """
    share = functional.interpolate(share[None], image.shape[-2:], mode="bilinear")[0].to(image)
    return share * image + (1 - share) * frame.to(image)
