"""Loads checkpoints, VLMs and LoRAs, and holds what ComfyUI has no type for.

Letters: B samples, L condition tokens, C cross-attention width.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management as management
import comfy.utils
import torch
from torch import nn

from .folders import LORA_FILE, folder_of, lora_folders, pipeline_folders, vlm_folders
from .model import LegoLatents, native_model
from .runtime import bring, managed, watched
from .text import encode_text, native_clip
from .vae import native_vae

if TYPE_CHECKING:  # diffusers and transformers take seconds to import, so they wait for the first use
    from lego_pipeline import LegoPipeline

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "float16", "bfloat16")
WITHOUT_MODELS: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler", "projector"))


@dataclass(eq=False)
class PipelineHandle:
    """LEGO_PIPELINE: the parts of a checkpoint that have no type in ComfyUI.

    Attributes:
        folder: of the checkpoint.
        config: settings of the `LegoPipeline`: resolution, question template, default steps and scales, ...
        projector: brings VLM embeddings to cross-attention width.
        patcher: of the projector.
        latent_format: of the model, for previews.
        dtype: of the UNet.
        loras: folders and strengths of the LoRAs that were added.
    """

    folder: Path
    config: Any
    projector: Any
    patcher: Any
    latent_format: Any
    dtype: torch.dtype
    loras: tuple[tuple[Path, float], ...] = ()
    _whole: "tuple[LegoPipeline, Any] | None" = field(default=None, repr=False)

    def pipeline(self) -> "LegoPipeline":
        """The checkpoint as a `LegoPipeline` without VLM, on its device; loaded at first use."""
        from lego_pipeline import LegoPipeline

        if self._whole is None:
            if self.loras:
                import peft  # noqa: F401  # without it diffusers' message names no package
            with torch.inference_mode(False):
                pipe = LegoPipeline.from_pretrained(self.folder, vlm=None, vlm_processor=None)
                for folder, strength in self.loras:
                    pipe.load_lora_weights(folder)
                    pipe.fuse_lora(lora_scale=strength)
                    pipe.unload_lora_weights()
                if self.loras:  # a copy, as a module can't be managed twice
                    pipe.register_modules(projector=copy.deepcopy(self.projector).cpu())
                if pipe.unet.dtype != self.dtype:
                    pipe.unet.to(self.dtype)
            pipe.set_progress_bar_config(disable=True)
            self._whole = pipe, managed(pipe.unet, pipe.vae, pipe.text_encoder, pipe.projector)
        pipe, patcher = self._whole
        bring(patcher)
        return pipe


@dataclass(eq=False)
class VlmHandle:
    """LEGO_VLM: a visual LLM under memory management.

    Attributes:
        name: as the loader shows it.
        pipe: a `LegoPipeline` that has the VLM and its processor and nothing else.
        patcher: of the VLM.
    """

    name: str
    pipe: "LegoPipeline"
    patcher: Any

    def vlm_id(self) -> str | None:
        """Of `lego_pipeline.enhance.vlm_id`, by which a checkpoint knows whether it was trained with this VLM."""
        from lego_pipeline.enhance import vlm_id

        return vlm_id(self.pipe.vlm, self.pipe.vlm_processor)

    def on_device(self, num_samples: int) -> "LegoPipeline":
        """The pipeline with its VLM brought to its device, with room for the keys and values of some samples."""
        text = self.pipe.vlm.config.get_text_config()
        length = min(getattr(text, "max_position_embeddings", 1024), 1024)
        element_size = torch.finfo(self.pipe.vlm.dtype).bits // 8
        bring(self.patcher, 2 * num_samples * length * text.num_hidden_layers * text.hidden_size * element_size)
        return self.pipe


def load_vlm(name: str, dtype: str = "auto") -> VlmHandle:
    """Loads the VLM of a listed folder.

    Raises:
        FileNotFoundError, ValueError: the folder isn't listed, is incomplete, or of an unknown family.
    """
    from lego_pipeline import LegoPipeline
    from lego_pipeline.vlm import VLM_FAMILIES

    folder = folder_of(name, vlm_folders())
    device = management.text_encoder_device()
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    wanted = automatic if dtype == "auto" else getattr(torch, dtype)
    with torch.inference_mode(False):
        if (folder / "model_index.json").is_file():
            pipe = LegoPipeline.from_pretrained(folder, dtype=wanted, **WITHOUT_MODELS)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            vlm = AutoModelForImageTextToText.from_pretrained(folder, dtype=wanted, local_files_only=True)
            pipe = LegoPipeline(
                **WITHOUT_MODELS, vlm=vlm, vlm_processor=AutoProcessor.from_pretrained(folder, local_files_only=True)
            )
    if pipe.vlm.config.model_type not in VLM_FAMILIES:
        raise ValueError(
            f"`model` must hold a VLM of a known family ({', '.join(VLM_FAMILIES)}), got "
            f"{pipe.vlm.config.model_type!r} in {name!r}; choose another folder."
        )
    _check_finite("vlm", pipe.vlm)
    return VlmHandle(name, pipe, managed(pipe.vlm))


def load_pipeline(name: str, dtype: str = "auto") -> tuple[Any, Any, Any, PipelineHandle]:
    """Loads a listed LegoPipeline folder as ComfyUI's objects.

    Args:
        name: from `pipeline_folders`.
        dtype: of the UNet's weights; "auto" is ComfyUI's choice for the device. "float32" also sets text encoder and
            VAE, which are left to ComfyUI otherwise.

    Returns:
        MODEL, CLIP, VAE and LEGO_PIPELINE.

    Raises:
        FileNotFoundError, ValueError: the folder isn't listed, is incomplete, or holds what ComfyUI's classes can't.
    """
    from lego_pipeline import LegoPipeline

    folder = folder_of(name, pipeline_folders())
    with torch.inference_mode(False), torch.no_grad():
        pipe = LegoPipeline.from_pretrained(folder, vlm=None, vlm_processor=None)
        for part in ("unet", "vae", "text_encoder", "projector"):
            _check_finite(part, getattr(pipe, part))
        count = sum(weight.numel() for weight in pipe.unet.parameters())
        unet_dtype = management.unet_dtype(model_params=count) if dtype == "auto" else getattr(torch, dtype)
        latents = partial(LegoLatents, pipe.vae)
        model = native_model(pipe.unet, pipe.scheduler.config, latents, unet_dtype)
        everything_plain = dtype == "float32"
        clip = native_clip(pipe.text_encoder, pipe.tokenizer, folder / "tokenizer", everything_plain)
        vae = native_vae(pipe.vae, everything_plain)
    handle = PipelineHandle(
        folder, pipe.config, pipe.projector, managed(pipe.projector), model.model.latent_format, unet_dtype
    )
    return model, clip, vae, handle


def without_models() -> "LegoPipeline":
    """A `LegoPipeline` without any component, for what needs none: reading a cache."""
    from lego_pipeline import LegoPipeline

    return LegoPipeline(**WITHOUT_MODELS)


def add_lora(model: Any, handle: PipelineHandle, name: str, strength: float) -> tuple[Any, PipelineHandle]:
    """MODEL and LEGO_PIPELINE with a LoRA of this project's training: the UNet's adapters and the projector.

    ComfyUI's own loader takes the same file, but it leaves the projector as it is, and where a key has no place it
    goes on with a line in the log.

    Raises:
        FileNotFoundError: the name isn't listed.
        ValueError: adapters belong to another UNet, or the projector to another VLM.
    """
    folder = folder_of(name, lora_folders(), "lora")
    weights = comfy.utils.load_torch_file(str(folder / LORA_FILE), safe_load=True)
    patches = comfy.lora.load_lora(weights, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    patched = model.clone()
    patched.add_patches(patches, strength)
    count = sum(key.endswith("lora_up.weight") for key in weights)
    if not count or len(patches) != count:
        raise ValueError(
            f"`lora` must fit this checkpoint's UNet, got {name!r} with {count} adapters of which {len(patches)} have "
            "a place in it; use the checkpoint that it was trained from."
        )
    projector, patcher = handle.projector, handle.patcher
    if (folder / "projector").is_dir():
        from lego_pipeline.projector import LegoProjector

        with torch.inference_mode(False):
            projector = LegoProjector.from_pretrained(folder / "projector")
        differing = [
            key for key in ("vlm_dim", "num_image_tokens") if projector.config[key] != handle.projector.config[key]
        ]
        if differing:
            raise ValueError(
                f"`lora` must have a projector for this checkpoint's VLM, got another {' and '.join(differing)} in "
                f"{name!r}; use the checkpoint that it was trained from."
            )
        patcher = managed(projector)
    loras = (*handle.loras, (folder, strength))
    return patched, replace(handle, projector=projector, patcher=patcher, loras=loras, _whole=None)


def encode_condition(
    handle: PipelineHandle,
    clip: Any,
    enhancements: Sequence[Any] | None,
    texts: Sequence[str] | None,
    negative_prompt: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Condition (B, L, C) and null condition (1, L, C), as `LegoPipeline.encode_condition`, with ComfyUI's CLIP.

    Args:
        handle: holds the projector.
        clip: text encoder.
        enhancements: B `Enhancement`s, or None.
        texts: B texts, used without enhancements: the VLM's parts are then zeros.
        negative_prompt: text of the null condition.

    Raises:
        ValueError: enhancements or text encoder belong to another model.
    """
    from lego_pipeline import checks

    projector, device = handle.projector, bring(handle.patcher)
    null = projector.null_condition(encode_text(clip, [negative_prompt]).to(device))
    if enhancements is None:
        if not handle.config["vlm_dropout"]:
            logger.warning(
                "Without a VLM its parts of the condition are zero, and this checkpoint was never trained so."
            )
        condition = projector(encode_text(clip, texts or []).to(device))
    else:
        checks.check_enhancements(enhancements, projector.config)
        moved = [item.to(device, torch.float32) for item in enhancements]
        checks.warn_of_unknown_frames(handle.config["frame_statistics"], moved)
        prompt_embeds = encode_text(clip, [item.description for item in moved]).to(device)
        image_embeds = torch.stack([item.image_embeds for item in moved])
        condition = projector(prompt_embeds, image_embeds, [item.text_embeds for item in moved])
    return condition.to(management.intermediate_device()), null.to(management.intermediate_device())


def enhance_then_return(vlm: VlmHandle, handle: PipelineHandle) -> Callable[..., Any]:
    """`enhance` of a storyboard: brings the VLM, lets it describe, and brings the pipeline back."""

    def enhance(frame: Any, action: str, generator: torch.Generator | None) -> Any:
        pipe = vlm.on_device(1)
        with watched(pipe.vlm, pipe.config["max_new_tokens"] + 1):
            enhancement = pipe.enhance(frame, action, generator=generator)[0].to("cpu")
        handle.pipeline()
        return replace(enhancement, vlm_id=vlm.vlm_id())

    return enhance


def _check_finite(name: str, module: nn.Module) -> None:
    broken = [key for key, value in module.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"`{name}` must have finite weights, got NaN or infinite values in {broken[0]} and {len(broken) - 1} "
            "more; the checkpoint is damaged, copy or download it again."
        )
