"""SDEdit (Meng et al., ICLR 2022): noise is laid on the frame, and a text-to-image model takes it away again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lego_pipeline.baselines.base import StableDiffusion

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class SdEdit(StableDiffusion):
    """diffusers' `StableDiffusionImg2ImgPipeline` on a text-to-image folder, with the folder's scheduler.

    Where the frame's latents are z_0, sampling starts at step t_0 = strength * T from
    ``sqrt(a_t0) z_0 + sqrt(1 - a_t0) noise`` instead of from noise alone. The paper names no strength; 0.8 is
    diffusers' default.

    Args:
        strength: in [0, 1]; share of the steps that are taken. Where that is less than one step, the picture is the
            frame through the VAE.
        num_inference_steps, guidance_scale, resolution: see `StableDiffusion`.

    Source: SDEdit, algorithm 1.
    """

    strength: float = 0.8

    loads = "StableDiffusionImg2ImgPipeline"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"`strength` must be between 0 and 1, got {self.strength}.")

    def draw_inputs(self, inputs: torch.Tensor, texts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
        if int(self.num_inference_steps * self.strength) < 1:
            return self.decode(self.encode(inputs))
        return self.pipeline(
            prompt=texts,
            image=inputs / 2 + 0.5,
            strength=self.strength,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=generators,
            output_type="pt",
        ).images * 2 - 1  # fmt: skip
