"""Folders of tiny Stable Diffusion pipelines: the components of tests/conftest.py in diffusers' own classes."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNUSED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_to_image_folder(components: dict[str, Any], folder: Path) -> Path:
    """A StableDiffusionPipeline of 32 pixels: VAE factor 4, 6 latent channels, DDIM with SD 1.5's settings."""
    config = {**components["unet"].config, "in_channels": components["vae"].config.latent_channels}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config(config)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    _save(StableDiffusionPipeline, components, folder, unet=unet, scheduler=scheduler)
    return folder


def instruct_pix2pix_folder(components: dict[str, Any], folder: Path) -> Path:
    """A StableDiffusionInstructPix2PixPipeline of the same sizes."""
    scheduler = EulerAncestralDiscreteScheduler(**NOISE, steps_offset=1)
    _save(StableDiffusionInstructPix2PixPipeline, components, folder, unet=components["unet"], scheduler=scheduler)
    return folder


def _save(cls: Any, components: dict[str, Any], folder: Path, **own: Any) -> None:
    shared = {name: copy.deepcopy(components[name]) for name in ("vae", "text_encoder", "tokenizer")}
    cls(**shared, **own, **UNUSED).save_pretrained(folder)
