"""A diffusers `AutoencoderKL` as ComfyUI's VAE.

Letters: B samples, c latent channels, h, w latent size, H, W pixels.
"""

from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from .model import unfit


class Autoencoder(nn.Module):
    """What ComfyUI's VAE asks of its inner model, done by diffusers' `AutoencoderKL`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mode of the posterior, not scaled; (B, 3, H, W) in [-1, 1] to (B, c, h, w)."""
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, c, h, w), not scaled, to (B, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents).sample


def native_vae(vae: Any, is_float32: bool = False) -> Any:
    """A diffusers `AutoencoderKL` as ComfyUI's VAE.

    ComfyUI converts the keys of one shape only, four blocks of two layers; any other loads without an error and gives
    NaN. So its VAE object is kept, with its tiling and memory handling, and the network inside stays diffusers' own.

    Args:
        vae: used as it is, not copied.
        is_float32: see `native_clip`.

    Raises:
        ValueError: the VAE shifts or whitens its latents.
    """
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if vae.config.get(name) is not None:
            raise ValueError(unfit(f"vae.{name}", "off", vae.config[name]))
    native = comfy.sd.VAE(sd={})  # sets the defaults and returns early
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    native.device = management.vae_device()
    native.vae_dtype = torch.float32 if is_float32 else management.vae_dtype(native.device, native.working_dtypes)
    native.first_stage_model = Autoencoder(vae).eval().requires_grad_(False).to(native.vae_dtype)
    native.latent_channels = vae.config.latent_channels
    native.downscale_ratio = native.upscale_ratio = factor
    native.memory_used_encode = lambda shape, dtype: 1767 * shape[2] * shape[3] * management.dtype_size(dtype)
    native.memory_used_decode = lambda shape, dtype: (
        2178 * shape[2] * shape[3] * factor**2 * management.dtype_size(dtype)
    )
    native.output_device = management.intermediate_device()
    native.disable_offload = True  # loaded whole: its layers aren't ComfyUI's
    management.archive_model_dtypes(native.first_stage_model)
    native.patcher = comfy.model_patcher.ModelPatcher(
        native.first_stage_model, load_device=native.device, offload_device=management.vae_offload_device()
    )
    native.model_size()
    return native


def pixels_per_cell(vae: Any) -> int:
    """Pixels along the side of a latent cell."""
    return int(vae.spacial_compression_encode())


def encode(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """Latents (B, c, h, w), not scaled, of pictures (B, 3, H, W) in [0, 1]."""
    return vae.encode(image.movedim(1, -1))
