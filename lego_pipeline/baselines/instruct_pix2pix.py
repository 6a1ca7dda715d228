"""InstructPix2Pix (Brooks et al., CVPR 2023): the paper's strongest baseline, with the label or with a description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lego_pipeline.baselines.base import StableDiffusion

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class InstructPix2Pix(StableDiffusion):
    """diffusers' `StableDiffusionInstructPix2PixPipeline`, the text as instruction.

    The defaults are those of that pipeline, and of LEGO's own sampling. The paper fine-tunes this model on its pairs;
    to fine-tune one, train with `train/train_ldm.py --embeddings none` and draw with `--system label-only`.

    Args:
        image_guidance_scale: of the frame, at least 1; diffusers switches both scales off below it, and where
            `guidance_scale` is at most 1.
        num_inference_steps, guidance_scale, resolution: see `StableDiffusion`.
    """

    num_inference_steps: int = 100
    image_guidance_scale: float = 1.5

    classes: ClassVar[tuple[str, ...]] = ("StableDiffusionInstructPix2PixPipeline",)
    loads: ClassVar[str] = "StableDiffusionInstructPix2PixPipeline"
    needs: ClassVar[str] = "an InstructPix2Pix folder in diffusers' layout"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.image_guidance_scale) and self.image_guidance_scale >= 1):
            raise ValueError(f"`image_guidance_scale` must be at least 1, got {self.image_guidance_scale}.")

    def draw_inputs(self, inputs: torch.Tensor, texts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
        return self.pipeline(
            prompt=texts,
            image=inputs / 2 + 0.5,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            generator=generators,
            output_type="pt",
        ).images * 2 - 1  # fmt: skip
