"""A running node in ComfyUI: progress bar, previews, cancel, and models under memory management."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import latent_preview
import torch
from torch import nn


def stop_if_asked() -> None:
    """Ends the node if the user pressed cancel."""
    management.throw_exception_if_processing_interrupted()


def progress(total: int) -> Callable[[int, Any], None]:
    """Progress bar of the running node: call with the number of parts done and a preview or None."""
    bar = comfy.utils.ProgressBar(total)
    return lambda done, preview=None: bar.update_absolute(done, total, preview)


@contextmanager
def watched(module: nn.Module, total: int) -> Generator[None, None, None]:
    """Within the block each call of a module moves the progress bar, and cancel ends the node before the next call."""
    show, calls = progress(total), 0

    def before(*_: Any) -> None:
        nonlocal calls
        stop_if_asked()
        calls += 1
        show(min(calls, total), None)

    hook = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


class Held(nn.Module):
    """Modules under ComfyUI's memory management; they can't be managed bare, as some have a read-only `device`."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.modules_held = nn.ModuleList(modules)


def managed(*modules: nn.Module) -> Any:
    """A `ModelPatcher` of modules that aren't made of ComfyUI's layers: they are loaded whole or not at all."""
    held = Held(*modules).eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(
        held,
        load_device=management.text_encoder_device(),
        offload_device=management.text_encoder_offload_device(),
    )


def bring(patcher: Any, memory_required: int = 0) -> torch.device:
    """Loads managed modules onto their device, freeing others for it; returns the device."""
    management.load_models_gpu([patcher], memory_required=memory_required, force_full_load=True)
    return patcher.load_device


def step_callback(latent_format: Any, total: int) -> Callable[..., dict[str, Any]]:
    """`callback_on_step_end` of a pipeline: moves the progress bar with a preview, and cancel ends the node."""
    show, done = progress(total), 0

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        stop_if_asked()
        done += 1
        latents = tensors["latents"]
        previewer = latent_preview.get_previewer(latents.device, latent_format)
        preview = None if previewer is None else previewer.decode_latent_to_preview_image("JPEG", latents.float())
        show(done, preview)
        return {}

    return after_step
