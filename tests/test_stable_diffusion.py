"""A LegoPipeline made from tiny Stable Diffusion and InstructPix2Pix folders of diffusers' own classes."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.stable_diffusion import lego_from_stable_diffusion, widen_input

SIZES: dict[str, Any] = {
    "vlm_dim": 32,
    "num_image_tokens": 4,
    "num_text_tokens": 6,
    "feed_forward_dim": 48,
    "resolution": 32,
}


@pytest.fixture(scope="module")
def make_folder(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a Stable Diffusion pipeline around a UNet of so many input channels, with the scheduler of SD 1.5."""

    def make(in_channels: int, pipeline: Any = StableDiffusionPipeline, **changes: Any) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            unet = UNet2DConditionModel.from_config(tiny_components["unet"].config, in_channels=in_channels, **changes)
        scheduler = PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        parts = {name: copy.deepcopy(tiny_components[name]) for name in ("vae", "text_encoder", "tokenizer")}
        folder = tmp_path_factory.mktemp("stable_diffusion") / "folder"
        pipeline(
            **parts,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def text_to_image(make_folder: Callable[..., Path]) -> Path:
    return make_folder(6)


def test_the_widened_unet_predicts_what_the_text_to_image_unet_does(text_to_image: Path) -> None:
    """With zero latents of a frame, and at the start with any."""
    before = UNet2DConditionModel.from_pretrained(text_to_image, subfolder="unet")
    after = lego_from_stable_diffusion(text_to_image, **SIZES).unet
    generator = torch.Generator().manual_seed(0)
    latents, frame = torch.randn(2, 2, 6, 8, 8, generator=generator)
    condition = torch.randn(2, 9, 32, generator=generator)
    with torch.no_grad():
        expected = before(latents, 300, condition).sample
        for image_latents in (torch.zeros_like(frame), frame):
            got = after(torch.cat([latents, image_latents], 1), 300, condition).sample
            assert torch.allclose(got, expected, atol=1e-6)


def test_new_channels_stand_behind_the_old_ones() -> None:
    unet: Any = torch.nn.Module()
    unet.conv_in = torch.nn.Conv2d(2, 3, 3, padding=1)
    unet.register_to_config = lambda **config: setattr(unet, "config", config)
    old: Any = copy.deepcopy(unet.conv_in)
    widen_input(unet, 4)
    assert torch.equal(unet.conv_in.weight[:, :2], old.weight)
    assert torch.equal(unet.conv_in.weight[:, 2:], torch.zeros(3, 2, 3, 3))
    assert (unet.conv_in.bias == old.bias).all()
    assert unet.config == {"in_channels": 4}


def test_a_pipeline_made_so_is_saved_and_draws(text_to_image: Path, frame: PIL.Image.Image, tmp_path: Path) -> None:
    lego_from_stable_diffusion(text_to_image, **SIZES, vlm_dropout=True).save_pretrained(tmp_path)
    pipe = LegoPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config["in_channels"] == pipe.unet.conv_in.in_channels == 12
    assert pipe.config["resolution"] == 32
    assert pipe(frame, action="open drawer", num_inference_steps=1).images[0].size == frame.size


def test_the_scheduler_keeps_the_noise_levels_and_spaces_them_as_lego_does(text_to_image: Path) -> None:
    config = lego_from_stable_diffusion(text_to_image, **SIZES).scheduler.config
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert (config["timestep_spacing"], config["steps_offset"]) == ("linspace", 0)


def test_the_projector_starts_from_its_seed_alone(text_to_image: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        weights.append(lego_from_stable_diffusion(text_to_image, **SIZES, seed=seed).projector.image_projection.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_instruct_pix2pix_unet_is_taken_as_it_is(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(12, StableDiffusionInstructPix2PixPipeline)
    before = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    after = lego_from_stable_diffusion(folder, **SIZES).unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_inpainting_unet_is_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"6 \(text-to-image\) or 12 .* got 13"):
        lego_from_stable_diffusion(make_folder(13), **SIZES)


def test_a_unet_of_another_width_is_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="32 wide states and nothing else, got cross-attention width 16"):
        lego_from_stable_diffusion(make_folder(6, cross_attention_dim=16), **SIZES)


def test_another_pipeline_is_refused(text_to_image: Path, tmp_path: Path) -> None:
    shutil.copytree(text_to_image, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError, match="must hold one of StableDiffusionPipeline, .* got StableDiffusionXLPipeline"):
        lego_from_stable_diffusion(tmp_path, **SIZES)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no model_index.json"):
        lego_from_stable_diffusion(tmp_path, **SIZES)


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "must name its pipeline as `_class_name`"), ("{", "model_index.json must be JSON")]
)
def test_a_broken_index_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        lego_from_stable_diffusion(tmp_path, **SIZES)


def test_weights_that_are_cut_off_are_named(text_to_image: Path, tmp_path: Path) -> None:
    shutil.copytree(text_to_image, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must have .* bytes by its header"):
        lego_from_stable_diffusion(tmp_path, **SIZES)
