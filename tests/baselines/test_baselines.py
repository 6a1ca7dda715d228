"""Baselines on tiny random pipelines: what they need, that they don't depend on the batch, and their limits."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)

from lego_pipeline import images
from lego_pipeline.baselines import BASELINES, Baseline, with_arguments
from lego_pipeline.baselines.base import StableDiffusion
from lego_pipeline.baselines.edit_pipeline import EditPipeline
from lego_pipeline.baselines.instruct_pix2pix import InstructPix2Pix
from lego_pipeline.baselines.sdedit import SdEdit

TEXTS = ["open drawer", "take cup", "close the tap with the left hand"]
QUICK: dict[str, dict[str, Any]] = {
    "copy": {},
    "instruct-pix2pix": {"num_inference_steps": 2},
    "sdedit": {"num_inference_steps": 3},
    "proxedit": {"num_inference_steps": 3},
    "diffusers": {"num_inference_steps": 2},
}


@pytest.fixture(scope="session")
def frames(make_frame) -> list[PIL.Image.Image]:
    """Of two aspects, so of two sizes at which a model works."""
    return [make_frame(32, 32, 0), make_frame(48, 28, 1), make_frame(32, 32, 2)]


@pytest.fixture
def folder_of(text_to_image: Path, edit: Path) -> dict[str, Path]:
    return {"copy": edit, "instruct-pix2pix": edit, "diffusers": edit, "sdedit": text_to_image,
            "proxedit": text_to_image}  # fmt: skip


def loaded(baseline: Baseline, folder: Path) -> Any:
    baseline.load(str(folder), torch.device("cpu"), torch.float32)
    return baseline


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(picture: PIL.Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def round_trip(baseline: StableDiffusion, frame: PIL.Image.Image) -> np.ndarray:
    """The frame through the VAE, as 8-bit pixels."""
    with torch.no_grad():
        decoded = baseline.decode(baseline.encode(images.to_model_input(frame, 32, 32)[None]))
    return pixels(images.to_pil(images.from_model_output(decoded)[0]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_picture_has_its_frames_size_and_does_not_depend_on_the_batch(
    name: str, frames: list[PIL.Image.Image], folder_of: dict[str, Path]
) -> None:
    baseline = loaded(BASELINES[name](**QUICK[name]), folder_of[name])
    together = baseline.draw(frames, TEXTS, generators([3, 4, 5]))
    assert [picture.size for picture in together] == [frame.size for frame in frames]
    for i, picture in enumerate(together):
        [alone] = baseline.draw([frames[i]], [TEXTS[i]], generators([3 + i]))
        assert np.abs(pixels(alone) - pixels(picture)).max() <= 1
    [other] = baseline.draw([frames[0]], [TEXTS[2]], generators([3]))
    assert (other == together[0]) == (name == "copy")  # the text counts


def test_the_copy_is_the_frame(frames: list[PIL.Image.Image]) -> None:
    assert BASELINES["copy"]().draw(frames, TEXTS, generators([0, 1, 2])) == frames


def test_instruct_pix2pix_draws_what_diffusers_does(frame: PIL.Image.Image, edit: Path) -> None:
    baseline = loaded(InstructPix2Pix(num_inference_steps=3, guidance_scale=5.0), edit)
    [drawn] = baseline.draw([frame], ["open drawer"], generators([7]))
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(edit)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "image_guidance_scale": 1.5}
    [expected] = pipeline("open drawer", frame, **settings, generator=generators([7])[0]).images
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1


def test_any_edit_pipeline_is_called_with_what_it_is_given(frame: PIL.Image.Image, edit: Path) -> None:
    any_pipeline = loaded(EditPipeline(num_inference_steps=3, guidance_scale=5.0), edit)
    named = loaded(InstructPix2Pix(num_inference_steps=3, guidance_scale=5.0), edit)
    first, second = (b.draw([frame], ["open drawer"], generators([7]))[0] for b in (any_pipeline, named))
    assert np.abs(pixels(first) - pixels(second)).max() <= 1
    smaller = loaded(EditPipeline(num_inference_steps=1, resolution=16), edit)
    assert smaller.draw([frame], ["open drawer"], generators([7]))[0].size == frame.size


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_sdedit_without_a_step_gives_the_frame_through_the_vae(
    strength: float, frame: PIL.Image.Image, text_to_image: Path
) -> None:
    baseline = loaded(SdEdit(num_inference_steps=3, strength=strength), text_to_image)
    [drawn] = baseline.draw([frame], ["open drawer"], generators([0]))
    assert np.abs(pixels(drawn) - round_trip(baseline, frame)).max() == 0


def test_sdedit_strays_farther_the_stronger_it_is(frame: PIL.Image.Image, text_to_image: Path) -> None:
    errors = []
    for strength in (0.1, 0.5, 1.0):
        baseline = loaded(SdEdit(num_inference_steps=10, strength=strength, guidance_scale=1.0), text_to_image)
        drawn = baseline.draw([frame] * 3, ["open drawer"] * 3, generators(range(3)))
        errors.append(np.mean([np.abs(pixels(picture) - round_trip(baseline, frame)).mean() for picture in drawn]))
    assert errors[0] < errors[1] < errors[2]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("sdedit", {"strenght": 0.5}, "must be one of num_inference_steps, guidance_scale, resolution, strength"),
        ("sdedit", {"strength": "much"}, "`strength` must be float, got 'much'"),
        ("sdedit", {"strength": True}, "`strength` must be float, got True"),
        ("sdedit", {"strength": 1.5}, "`strength` must be between 0 and 1"),
        ("sdedit", {"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ("sdedit", {"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ("sdedit", {"resolution": 4}, "`resolution` must be at least 8"),
        ("instruct-pix2pix", {"image_guidance_scale": 0.5}, "`image_guidance_scale` must be at least 1"),
        ("proxedit", {"proximal": "l2"}, "`proximal` must be l0 or l1, got 'l2'"),
        ("proxedit", {"quantile": -0.1}, "`quantile` must be between 0 and 1"),
        ("proxedit", {"dilation": -1}, "`dilation` must be at least 0"),
        ("copy", {"strength": 0.5}, "must be one of none"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(name: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match="must") as error:
        with_arguments(BASELINES[name], arguments)
    assert expected in str(error.value)


def test_settings_that_fit_are_taken() -> None:
    baseline = with_arguments(BASELINES["proxedit"], {"quantile": 1, "proximal": "l1", "resolution": None})
    assert (baseline.settings["quantile"], baseline.settings["proximal"]) == (1, "l1")


@pytest.mark.parametrize("name", ["sdedit", "proxedit"])
def test_an_edit_folder_is_refused_where_a_text_to_image_one_is_needed(name: str, edit: Path) -> None:
    with pytest.raises(ValueError, match="must be a text-to-image folder .* got a StableDiffusionInstructPix2Pix"):
        loaded(BASELINES[name](), edit)


def test_a_text_to_image_folder_is_refused_where_an_edit_one_is_needed(text_to_image: Path) -> None:
    with pytest.raises(ValueError, match="must be an InstructPix2Pix folder"):
        loaded(InstructPix2Pix(), text_to_image)
    with pytest.raises(ValueError, match="whose call takes `image` and `prompt`, got StableDiffusionPipeline"):
        loaded(EditPipeline(), text_to_image)


def test_a_folder_that_lies_about_its_class_is_refused_by_its_unet(edit: Path, tmp_path: Path) -> None:
    shutil.copytree(edit, tmp_path / "lying")
    index = tmp_path / "lying" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="whose UNet has 6 input channels, got 12"):
        loaded(SdEdit(), tmp_path / "lying")


@pytest.mark.parametrize("name", ["sdedit", "diffusers"])
def test_no_folder_is_said_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no readable model_index.json"):
        loaded(BASELINES[name](), tmp_path)


def test_a_weight_file_that_is_cut_off_is_named(text_to_image: Path, tmp_path: Path) -> None:
    shutil.copytree(text_to_image, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors"):
        loaded(SdEdit(), tmp_path / "cut")


def test_arguments_that_an_edit_pipeline_does_not_take_are_named(edit: Path, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="one that StableDiffusionInstructPix2PixPipeline takes, got strength"):
        loaded(EditPipeline(strength=0.5), edit)
    with pytest.raises(ValueError, match="must not be one of self, image, prompt"):
        EditPipeline(image=1)
    with pytest.raises(ValueError, match="must not be one of self, image"):
        EditPipeline(**{"self": 1})
    with pytest.raises(ValueError, match="got LegoPipeline .* use --system lego"):
        loaded(EditPipeline(), tiny_folder)
