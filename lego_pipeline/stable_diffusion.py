"""A LegoPipeline to train, made from a Stable Diffusion 1.x folder: its weights, a wider input layer, a new projector.

Two kinds of folders in diffusers' layout: text-to-image, whose UNet gets input channels for the frame's latents as
InstructPix2Pix (Brooks et al., CVPR 2023, section 3.2) and LEGO do, with the pretrained weights copied and the new
ones zero; and InstructPix2Pix, whose UNet has them. LEGO starts from SD 1.5 (facts: `BolinLai/LEGO:
stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`).
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.processing_utils import ProcessorMixin

from lego_pipeline.loading import check_component
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.projector import LegoProjector

KNOWN = ("StableDiffusionPipeline", "StableDiffusionInstructPix2PixPipeline")


def pipeline_class(folder: str | Path) -> str:
    """Name of the pipeline class that a folder, or a repository of the model hub, was saved from.

    Raises:
        FileNotFoundError: there is no `model_index.json`.
        ValueError: it is no JSON, or names no class.
    """
    try:
        config: Any = DiffusionPipeline.load_config(folder)
    except OSError as error:
        index = Path(folder) / "model_index.json"
        if index.is_file():
            raise ValueError(
                f"{index} must be JSON, but can't be read; copy or download the whole folder again."
            ) from error
        raise FileNotFoundError(
            f"`pipeline` must be a folder in diffusers' layout, found no model_index.json at {folder}; "
            "pass a LegoPipeline, an InstructPix2Pix or a Stable Diffusion 1.x folder."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(
            f"model_index.json of {folder} must name its pipeline as `_class_name`, got none; copy or download the "
            "whole folder again."
        )
    return config["_class_name"]


def widen_input(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Gives a UNet's input convolution more channels: the old weights copied, the new ones zero.

    With zeros in the new channels, or anything else, the UNet predicts what it did; training starts from there.

    Args:
        unet: changed in place, config included.
        in_channels: of the new convolution.
    """
    conv = unet.conv_in
    added = conv.weight.new_zeros(conv.out_channels, in_channels - conv.in_channels, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.cat([conv.weight.detach(), added], 1))
    conv.in_channels = in_channels
    unet.register_to_config(in_channels=in_channels)


def lego_from_stable_diffusion(
    folder: str | Path,
    *,
    vlm_dim: int = 5120,
    num_image_tokens: int = 256,
    num_text_tokens: int = 77,
    feed_forward_dim: int = 2048,
    resolution: int = 256,
    variant: str | None = None,
    vlm: PreTrainedModel | None = None,
    vlm_processor: ProcessorMixin | None = None,
    seed: int = 0,
    **settings: Any,
) -> LegoPipeline:
    """LegoPipeline in float32 around the weights of a Stable Diffusion folder, with a random projector.

    Args:
        folder: of a StableDiffusionPipeline or StableDiffusionInstructPix2PixPipeline, 1.x shapes.
        vlm_dim, num_image_tokens: D and N_i of the VLM.
        num_text_tokens, feed_forward_dim: of the projector. All four have the released sizes by default.
        resolution: side in pixels of the square whose area will be trained at.
        variant: of the weight files, e.g. "fp16".
        vlm, vlm_processor: put into the pipeline.
        seed: of the projector's weights; torch's global generator is left as it is.
        **settings: further ones of `LegoPipeline`, such as `question_template`.

    Raises:
        FileNotFoundError: no such folder, or one that lacks a file.
        ValueError: another pipeline, a file that is cut off, or a UNet that LEGO's sampling can't drive.
    """
    name = pipeline_class(folder)
    if name not in KNOWN:
        raise ValueError(
            f"`folder` must hold one of {', '.join(KNOWN)}, got {name}; pass a Stable Diffusion 1.x folder."
        )
    if Path(folder).is_dir():
        for component in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            check_component(Path(folder) / component, variant)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32, variant=variant)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32, variant=variant)
    text_encoder = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32, variant=variant
    )
    _check_unet(unet, vae.config["latent_channels"], text_encoder.config.hidden_size)
    if unet.config["in_channels"] == vae.config["latent_channels"]:
        widen_input(unet, 2 * vae.config["latent_channels"])
    # As LEGO samples; the folder's own scheduler (PNDM in SD 1.5) brings its noise levels and prediction type.
    config: Any = EulerAncestralDiscreteScheduler.load_config(folder, subfolder="scheduler")
    scheduler: Any = EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="linspace", steps_offset=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LegoProjector(
            vlm_dim=vlm_dim,
            cross_attention_dim=unet.config["cross_attention_dim"],
            num_image_tokens=num_image_tokens,
            num_text_tokens=num_text_tokens,
            feed_forward_dim=feed_forward_dim,
        )
    return LegoPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        unet=unet,
        scheduler=scheduler,
        projector=projector,
        vlm=vlm,
        vlm_processor=vlm_processor,
        resolution=resolution,
        **settings,
    )


def _check_unet(unet: UNet2DConditionModel, latent_channels: int, text_width: int) -> None:
    config = unet.config
    if config["in_channels"] not in (latent_channels, 2 * latent_channels):
        raise ValueError(
            f"`unet` must have {latent_channels} (text-to-image) or {2 * latent_channels} (InstructPix2Pix) input "
            f"channels, got {config['in_channels']}; an inpainting or depth UNet can't be used."
        )
    if config["cross_attention_dim"] != text_width or config["addition_embed_type"] or config["class_embed_type"]:
        raise ValueError(
            f"`unet` must take the text encoder's {text_width} wide states and nothing else, got cross-attention "
            f"width {config['cross_attention_dim']}, addition_embed_type {config['addition_embed_type']!r}, "
            f"class_embed_type {config['class_embed_type']!r}; pass a Stable Diffusion 1.x folder."
        )
