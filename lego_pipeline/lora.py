"""LoRA of the UNet: added by peft, merged for a plain pipeline folder, exported for diffusers and for ComfyUI.

Beside the attention's four linear layers the input convolution gets an adapter: it alone reads the frame's latents,
and after `lego_pipeline.stable_diffusion.widen_input` its weights for them are zero.

Everything but `add_lora` works on a state dict, so that averaged weights, and weights gathered from several devices,
go the same way. Letters: r rank, alpha the numerator of the scale; an adapter adds `alpha / r * B A` to a weight.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv_in")
ADAPTER = "default"  # peft's name for an adapter that got none
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui.safetensors"


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: int, seed: int = 0, targets: Sequence[str] = TARGETS
) -> None:
    """Freezes a UNet and adds trainable adapters that change nothing yet (B is zero).

    Args:
        unet: of the pipeline.
        rank: r, of every adapter.
        alpha: usually r or 2 r.
        seed: of A, so that all processes start alike; torch's global generator is left as it is.
        targets: ends of the names of the layers that get one.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('LoRA needs peft; run `pip install "lego-pipeline[train]"`.') from error
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), ADAPTER)


def lora_layers(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module name, A, B) of every adapter in a UNet's state dict; A (r, in) or (r, in, k, k), B (out, r, ...)."""
    for name, down in state.items():
        if name.endswith(f".lora_A.{ADAPTER}.weight"):
            module = name.removesuffix(f".lora_A.{ADAPTER}.weight")
            yield module, down, state[f"{module}.lora_B.{ADAPTER}.weight"]


def merge_lora(state: Mapping[str, torch.Tensor], alpha: int) -> dict[str, torch.Tensor]:
    """State dict of a plain UNet in which the adapters of `state` are added to the weights.

    Args:
        state: of a UNet with or without adapters.
        alpha: as given to `add_lora`.
    """
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for module, down, up in lora_layers(state):
        delta = (alpha / len(down)) * up.flatten(1).float() @ down.flatten(1).float()
        weight = merged[f"{module}.weight"]
        merged[f"{module}.weight"] = weight + delta.reshape(weight.shape).to(weight.dtype)
    return merged


def export_lora(state: Mapping[str, torch.Tensor], alpha: int, folder: Path) -> None:
    """Writes the adapters twice: for `LegoPipeline.load_lora_weights` and for ComfyUI's own LoRA loader.

    `pytorch_lora_weights.safetensors` has diffusers' names, and alpha in its metadata. `comfyui.safetensors` has the
    names of `kohya-ss/sd-scripts`, with alpha as a tensor beside each pair: the names that ComfyUI maps today, and
    without the tensor it would take alpha = r.

    Args:
        state: of a UNet with adapters.
        alpha: as given to `add_lora`.
        folder: made if absent.

    Raises:
        ValueError: the state has no adapter.
    """
    layers = list(lora_layers(state))
    if not layers:
        raise ValueError("`state` must hold LoRA weights, got none; call `add_lora` before training.")
    rank = len(layers[0][1])
    folder.mkdir(parents=True, exist_ok=True)
    diffusers_names, comfyui_names = {}, {}
    for module, down, up in layers:
        down, up = (tensor.detach().cpu().contiguous() for tensor in (down, up))
        diffusers_names |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        key = f"lora_unet_{module.replace('.', '_')}"
        comfyui_names |= {f"{key}.lora_down.weight": down.clone(), f"{key}.lora_up.weight": up.clone()}
        comfyui_names[f"{key}.alpha"] = torch.tensor(float(alpha))
    metadata = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(module for module, _, _ in layers)}
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, diffusers_names, unet_lora_adapter_metadata=metadata)
    save_file(comfyui_names, folder / COMFYUI_FILE, {"format": "pt"})


def read_lora(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Adapters that `export_lora` wrote for diffusers, under their names in a UNet's state dict, and alpha.

    Raises:
        FileNotFoundError: none are there.
        ValueError: the file is damaged or has no alpha of its own.
    """
    path = folder / DIFFUSERS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"`{folder}` must hold {DIFFUSERS_FILE}, found none.")
    try:
        with safe_open(path, "pt") as file:
            alpha = json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"]
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` must hold adapters with their alpha, but cannot be read ({error}).") from error
    names = {name: name.removeprefix("unet.").removesuffix(".weight") for name in stored}
    return {f"{names[name]}.{ADAPTER}.weight": tensor for name, tensor in stored.items()}, alpha
