"""LoRA of the tiny UNet: what is trained, what is merged, and that every exported form means the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file

from lego_pipeline.lora import COMFYUI_FILE, add_lora, export_lora, merge_lora
from lego_pipeline.pipeline_lego import LegoPipeline

RANK, ALPHA = 2, 6


@pytest.fixture
def adapted(tiny_pipeline: LegoPipeline) -> UNet2DConditionModel:
    """The tiny UNet with adapters that do something."""
    add_lora(tiny_pipeline.unet, RANK, ALPHA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tiny_pipeline.unet.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return tiny_pipeline.unet


def prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    """Of fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    latents, condition = torch.randn(1, 12, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, 500, condition).sample


def test_new_adapters_change_nothing_and_are_all_that_is_trained(tiny_pipeline: LegoPipeline) -> None:
    before = prediction(tiny_pipeline.unet)
    add_lora(tiny_pipeline.unet, RANK, ALPHA)
    assert torch.equal(prediction(tiny_pipeline.unet), before)
    trained = {name for name, parameter in tiny_pipeline.unet.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in tiny_pipeline.unet.named_parameters() if ".lora_" in name}
    assert any(name.startswith("conv_in.") for name in trained)


def test_adapters_start_alike_whatever_the_global_generator(make_tiny_pipeline: Callable[..., LegoPipeline]) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        unet = make_tiny_pipeline().unet
        add_lora(unet, RANK, ALPHA)
        states.append(unet.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_merged_unet_predicts_what_the_adapted_one_does(
    adapted: UNet2DConditionModel, make_tiny_pipeline: Callable[..., LegoPipeline]
) -> None:
    plain = make_tiny_pipeline().unet
    assert not torch.allclose(prediction(plain), prediction(adapted), atol=1e-3)
    plain.load_state_dict(merge_lora(adapted.state_dict(), ALPHA))
    assert torch.allclose(prediction(plain), prediction(adapted), atol=1e-5)


def test_a_state_without_adapters_is_merged_to_itself(tiny_pipeline: LegoPipeline) -> None:
    state = tiny_pipeline.unet.state_dict()
    merged = merge_lora(state, ALPHA)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_the_file_for_diffusers_loads_with_its_alpha(
    adapted: UNet2DConditionModel, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    export_lora(adapted.state_dict(), ALPHA, tmp_path)
    pipe = make_tiny_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(prediction(pipe.unet), prediction(adapted), atol=1e-5)


def test_both_files_add_the_same_to_every_weight(adapted: UNet2DConditionModel, tmp_path: Path) -> None:
    """The second one read by the rule of kohya's format: up times down times alpha / rank, names joined by `_`."""
    state = adapted.state_dict()
    export_lora(state, ALPHA, tmp_path)
    tensors, merged = load_file(tmp_path / COMFYUI_FILE), merge_lora(state, ALPHA)
    base = merge_lora({name: tensor for name, tensor in state.items() if ".lora_" not in name}, ALPHA)
    modules = {name.removesuffix(".weight"): name for name in base if not torch.equal(base[name], merged[name])}
    assert len(tensors) == 3 * len(modules) > 0
    for module, name in modules.items():
        key = f"lora_unet_{module.replace('.', '_')}"
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        scale = tensors[f"{key}.alpha"] / down.shape[0]
        delta = scale * torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1)).reshape(base[name].shape)
        assert torch.allclose(base[name] + delta, merged[name], atol=1e-6), module


def test_an_export_without_adapters_is_refused(tiny_pipeline: LegoPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`state` must hold LoRA weights"):
        export_lora(tiny_pipeline.unet.state_dict(), ALPHA, tmp_path)
