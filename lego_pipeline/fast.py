"""A few-step model as what it adds to a pipeline folder: adapters of the UNet, a scheduler, and settings of a call.

`train/distill_ldm.py` makes such a folder; as `fast` inside a pipeline folder it is found by `lego generate --fast`.

    pytorch_lora_weights.safetensors   adapters, for `load_fast` and for diffusers' `load_lora_weights`
    scheduler_config.json              of diffusers' LCMScheduler
    fast.json                          `settings` of a call; what else is in it is for reading
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from lego_pipeline.atomic import write_text
from lego_pipeline.checkpoints import FAST
from lego_pipeline.lora import export_lora, merge_lora, read_lora

FACTS = "fast.json"
SETTINGS = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "guidance_interval")


def save_fast(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    alpha: int,
    scheduler: LCMScheduler,
    facts: Mapping[str, Any],
) -> None:
    """Writes a few-step model, its adapters in half precision.

    Args:
        folder: made if absent.
        state: of a UNet with adapters.
        alpha: as given to `lego_pipeline.lora.add_lora`.
        scheduler: as it is used for sampling.
        facts: `settings` with the names of SETTINGS, and anything else that JSON can hold.
    """
    export_lora({name: tensor.half() for name, tensor in state.items() if ".lora_" in name}, alpha, folder)
    scheduler.save_pretrained(folder)
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def load_fast(pipeline: Any, folder: Path) -> None:
    """Makes a LegoPipeline a few-step one; see `LegoPipeline.load_fast`."""
    folder = folder / FAST if (folder / FAST).is_dir() else folder
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(
            f"`folder` must hold a few-step model, found no {FACTS} in {folder}; make one with train/distill_ldm.py, "
            f"and put it into the pipeline's folder as `{FAST}`."
        )
    if isinstance(pipeline.scheduler, LCMScheduler):
        raise ValueError(
            "`pipeline` must not be a few-step one already, got one with an LCMScheduler; load it again first."
        )
    unet = pipeline.unet
    weights = unet.state_dict()
    if any(".base_layer." in name or tensor.is_meta for name, tensor in weights.items()):
        raise ValueError(
            "`pipeline` must have plain weights, got adapters or weights that were moved away; call `load_fast` right "
            "after `from_pretrained`, before adapters are loaded or offloading is enabled."
        )
    # Whatever can fail is done before anything is changed.
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        settings = {name: facts["settings"][name] for name in SETTINGS}
        scheduler = LCMScheduler.from_pretrained(folder)
        state, alpha = read_lora(folder)
        merged = merge_lora({**weights, **_on(unet.device, state)}, alpha)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"`folder` must hold a few-step model of this UNet, got {folder}, which does not fit ({error}); distil it "
            "from this checkpoint."
        ) from error
    unet.load_state_dict(merged)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.register_to_config(**settings)


def _on(device: torch.device, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in state.items()}
