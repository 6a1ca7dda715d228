"""A diffusers UNet as ComfyUI's MODEL, with its latent format, noise levels and guidance.

Letters: c latent channels, C, M, U the predictions with condition and frame, frame only, neither.
"""

from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import comfy.utils
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from torch import nn

# What ComfyUI's UNet of Stable Diffusion 1.x is built as; other values are other networks.
UNET_FACTS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' names and ComfyUI's
PREDICTIONS = {
    "epsilon": comfy.model_sampling.EPS,
    "v_prediction": comfy.model_sampling.V_PREDICTION,
    "sample": comfy.model_sampling.X0,
}


class LegoLatents(comfy.latent_formats.LatentFormat):
    """Latents of a checkpoint: channels, scale, pixels per cell, and the colours of the live preview.

    Args:
        vae: diffusers' `AutoencoderKL`.
    """

    def __init__(self, vae: Any):
        super().__init__()
        self.latent_channels = vae.config.latent_channels
        self.scale_factor = vae.config.scaling_factor
        self.spacial_downscale_ratio = 2 ** (len(vae.config.block_out_channels) - 1)
        known = comfy.latent_formats.SD15()
        if (self.latent_channels, self.scale_factor) == (known.latent_channels, known.scale_factor):
            self.latent_rgb_factors, self.taesd_decoder_name = known.latent_rgb_factors, known.taesd_decoder_name
        else:
            factors, bias = preview_colours(vae)
            self.latent_rgb_factors, self.latent_rgb_factors_bias = factors.tolist(), bias.tolist()


def preview_colours(vae: Any, num_samples: int = 4, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear map from scaled latents to mean colours that best fits what the VAE decodes from random latents.

    Returns:
        (c, 3) and (3,), for colours in [-1, 1].
    """
    generator = torch.Generator().manual_seed(0)
    channels = vae.config.latent_channels
    cells = torch.randn(num_samples, channels, size, size, generator=generator)
    smooth = nn.functional.avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False) * 3  # neighbours alike
    latents = torch.cat([smooth, torch.zeros_like(smooth[:1])])
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()  # (n, 3, H, W)
    colours = nn.functional.adaptive_avg_pool2d(decoded, size).movedim(1, -1).reshape(-1, 3)
    known = latents.movedim(1, -1).reshape(-1, channels)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    # A little weight decay keeps the map tame where there are more channels than samples say anything about.
    square = known.T @ known + 1e-2 * len(known) * torch.eye(channels + 1)
    solution = torch.linalg.solve(square, known.T @ colours)
    return solution[:-1], solution[-1]


class Width:
    """A level's width as a factor of the first level's; ComfyUI only ever multiplies it with that one."""

    def __init__(self, width: int, base: int):
        self.width, self.base = width, base

    def __mul__(self, base: int) -> int:
        if base != self.base:
            return NotImplemented
        return self.width

    __rmul__ = __mul__


class LegoModel(comfy.model_base.SD15_instructpix2pix):
    """ComfyUI's InstructPix2Pix model, for any prediction type."""

    def __init__(self, model_config: Any, prediction_type: str, device: torch.device | None = None):
        super().__init__(model_config, device=device)
        kind = type("ModelSampling", (comfy.model_sampling.ModelSamplingDiscrete, PREDICTIONS[prediction_type]), {})
        self.model_sampling = kind(model_config)


def unet_config(unet: Any) -> dict[str, Any]:
    """ComfyUI's description of a diffusers UNet.

    Raises:
        ValueError: the UNet has a part that ComfyUI's class doesn't have.
    """
    config = unet.config
    for name, expected in UNET_FACTS.items():
        if config.get(name, expected) != expected:
            raise ValueError(unfit(f"unet.{name}", expected, config[name]))
    down = [_depth(kind, ("DownBlock2D", "CrossAttnDownBlock2D")) for kind in config.down_block_types]
    up = [_depth(kind, ("UpBlock2D", "CrossAttnUpBlock2D")) for kind in config.up_block_types]
    if up[::-1] != down:
        raise ValueError(unfit("unet.up_block_types", "the down blocks in reverse", list(config.up_block_types)))
    heads = config.num_attention_heads or config.attention_head_dim
    if not isinstance(heads, int) or not isinstance(config.layers_per_block, int):
        raise ValueError(unfit("unet.attention_head_dim and layers_per_block", "one number for all levels", heads))
    widths, layers = config.block_out_channels, config.layers_per_block
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": widths[0],
        "num_res_blocks": [layers] * len(widths),
        "channel_mult": [w // widths[0] if w % widths[0] == 0 else Width(w, widths[0]) for w in widths],
        "num_heads": heads,
        "num_head_channels": -1,
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in down for _ in range(layers + 1)],
        "context_dim": config.cross_attention_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.use_linear_projection,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
    }


def sampling_settings(scheduler: Any) -> dict[str, Any]:
    """ComfyUI's description of the noise levels of a diffusers scheduler's config.

    Raises:
        ValueError: ComfyUI can't represent them.
    """
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(name):
            raise ValueError(unfit(f"scheduler.{name}", "off", scheduler[name]))
    for name, known in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTIONS)):
        if scheduler.get(name) not in known:
            raise ValueError(unfit(f"scheduler.{name}", " or ".join(known), scheduler.get(name)))
    return {
        "beta_schedule": BETA_SCHEDULES[scheduler["beta_schedule"]],
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "timesteps": scheduler["num_train_timesteps"],
    }


def native_model(unet: Any, scheduler: Any, latents: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A diffusers UNet as ComfyUI's MODEL.

    Args:
        unet: `UNet2DConditionModel`; weights that are of the dtype are shared with it, the others copied.
        scheduler: config of the checkpoint's scheduler.
        latents: gives the latent format.
        dtype: of the weights.

    Raises:
        ValueError: a part of the UNet or of the scheduler has no counterpart.
    """
    config, sampling = unet_config(unet), sampling_settings(scheduler)
    prediction_type = scheduler["prediction_type"]

    class LegoConfig(comfy.supported_models.SD15_instructpix2pix):
        unet_extra_config = {"num_heads": config["num_heads"], "num_head_channels": -1}
        latent_format = latents
        sampling_settings = sampling

        def get_model(self, state_dict: dict, prefix: str = "", device: torch.device | None = None) -> LegoModel:
            return LegoModel(self, prediction_type, device)

    places, weights = comfy.utils.unet_to_diffusers(config), unet.state_dict()
    homeless = sorted(weights.keys() - places.keys())
    if homeless:
        raise ValueError(
            unfit("unet", "the weights of ComfyUI's class", f"{len(homeless)} others, {homeless[0]} first")
        )
    offload_device = management.unet_offload_device()
    native = {places[key]: weight.to(offload_device, dtype) for key, weight in weights.items()}
    model_config = LegoConfig(config)
    load_device = management.get_torch_device()
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device))
    model = model_config.get_model(native, "", offload_device)
    missing = sorted(model.diffusion_model.state_dict().keys() - native.keys())
    if missing:
        raise ValueError(unfit("unet", "all weights of ComfyUI's class", f"{len(missing)} fewer, {missing[0]} first"))
    model.diffusion_model.load_state_dict(native, assign=True)
    # Looked up at call time: on CUDA ComfyUI replaces this class when it starts.
    patcher_class = comfy.model_patcher.CoreModelPatcher
    return patcher_class(model, load_device=load_device, offload_device=offload_device)


def _depth(kind: str, kinds: tuple[str, str]) -> int:
    if kind not in kinds:
        raise ValueError(unfit("unet block", " or ".join(kinds), kind))
    return kinds.index(kind)


def two_scale_guider(
    model: Any, condition: Any, image_only: Any, null: Any, guidance_scale: float, image_guidance_scale: float
) -> Any:
    """ComfyUI's GUIDER with LEGO's two scales: U + s_T (C - M) + s_I (M - U), as `lego_pipeline.guidance`.

    The stock node DualCFGGuider with style "regular" is the same.
    """
    guider = Guider_DualCFG(model)
    guider.set_conds(condition, image_only, null)
    guider.set_cfg(guidance_scale, image_guidance_scale)
    return guider


def unfit(name: str, expected: Any, value: Any) -> str:
    """Message for a part of a checkpoint that has no counterpart in ComfyUI."""
    return (
        f"`{name}` must be {expected} in ComfyUI, got {value}; such a checkpoint runs in Python only "
        "(`LegoPipeline.from_pretrained`)."
    )
