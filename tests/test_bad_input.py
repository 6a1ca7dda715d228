"""Bad input to the pipeline: the right result, or an error that says what was expected, what came and what to do.

One test for each kind of bad input. The parts are tested closer in `test_images.py` (files, modes, ranges),
`test_loading.py` (every way in which a folder can be broken) and `test_guidance.py`; here it is the call that a user
makes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import images
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.vlm.base import Enhancement

ACTION = "open drawer"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pipe(make_tiny_pipeline: Callable[..., LegoPipeline]) -> LegoPipeline:
    """One pipeline for all tests, none of which changes it."""
    return make_tiny_pipeline()


def generate(pipe: LegoPipeline, image: Any, **arguments: Any) -> torch.Tensor:
    """Latents after one step, seeded."""
    options = {"description": "The hand pulls.", "num_inference_steps": 1, "output_type": "latent", **arguments}
    return pipe(image, generator=torch.Generator().manual_seed(0), **options).images


def refuse(pipe: LegoPipeline, message: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    """The call ends in `error`, whose text has the parts of `message`, before any answer."""
    arguments = {"image": PIL.Image.new("RGB", (32, 32)), "description": "The hand pulls.", **arguments}
    with pytest.raises(error, match=message):
        pipe(**{"num_inference_steps": 1, **arguments})


# --- Images -------------------------------------------------------------------------------------------------------


def test_an_unreadable_file_is_named_with_its_cause(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "locked.png").write_bytes(b"picture")
    monkeypatch.setattr(PIL.Image, "open", refused)
    with pytest.raises(ValueError, match=r"locked\.png must be readable, got: .*Permission denied.*; copy"):
        images.read_image(tmp_path / "locked.png")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png must hold a picture, got an empty file; copy or download"):
        images.read_image(tmp_path / "empty.png")


def test_a_truncated_picture_that_pillow_opened_lazily_is_refused_by_the_call(pipe, make_frame, tmp_path):
    path = tmp_path / "cut.png"
    make_frame(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with PIL.Image.open(path) as image:
        refuse(pipe, r"cut\.png` must be complete, got: .*; copy or download it again", image=image)


def test_a_picture_of_one_pixel_is_refused_with_the_least_size(pipe):
    refuse(pipe, "`image` must be at least 8 pixels .*got 1x1; pass", image=PIL.Image.new("RGB", (1, 1)))


def test_a_palette_picture_counts_as_its_colours(pipe, frame):
    palette = frame.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    assert torch.equal(generate(pipe, palette), generate(pipe, palette.convert("RGB")))


def test_an_rgba_picture_counts_as_laid_on_white(pipe, frame):
    rgba = frame.copy()
    rgba.putalpha(0)
    assert torch.equal(generate(pipe, rgba), generate(pipe, PIL.Image.new("RGB", frame.size, "white")))


def test_a_16_bit_picture_counts_as_its_upper_8_bits(pipe, frame):
    grey = np.asarray(frame.convert("L"))
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(generate(pipe, deep), generate(pipe, PIL.Image.fromarray(grey).convert("RGB")))


def test_a_greyscale_picture_counts_as_grey_rgb(pipe, frame):
    grey = frame.convert("L")
    assert torch.equal(generate(pipe, grey), generate(pipe, grey.convert("RGB")))


def test_an_exif_rotated_picture_is_turned_upright(pipe, make_frame, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    upright = make_frame(24, 40)
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    with PIL.Image.open(tmp_path / "turned.png") as turned:
        assert torch.equal(generate(pipe, turned), generate(pipe, upright))


def test_a_picture_of_100_megapixels_is_made_small_without_a_warning(pipe):
    large = PIL.Image.new("L", (12_500, 8_000), 128)
    assert generate(pipe, large).shape == (1, 6, 6, 10)


# --- Texts and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["action", "description"])
@pytest.mark.parametrize("text", ["", " \n", "...", ["open drawer", ""]])
def test_an_empty_text_is_refused_with_an_example(pipe, name, text):
    refuse(pipe, f'`{name}` must say something, got .*; pass for instance "open drawer"', **{name: text})


@pytest.mark.parametrize("arguments", [{"description": None, "action": "slice " * 99}, {"description": "slice " * 99}])
def test_an_overlong_text_is_refused_with_what_the_vlm_reads(pipe, arguments):
    refuse(pipe, "`action` and `description` must fit into the 512 tokens .*got .*; pass shorter texts", **arguments)


def test_an_overlong_action_without_a_vlm_is_cut_off_with_a_warning(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None, vlm_dropout=True)
    with pytest.warns(UserWarning, match="The text encoder reads 77 tokens .*this was cut off"):
        latents = generate(pipe, frame, description=None, action="slice " * 20)
    assert torch.equal(latents, generate(pipe, frame, description=None, action="slice " * 15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"description": ["a", "b"]}, "lists of a call must have one common length.*`description` 2"),
        ({"negative_prompt": ["a", "b"]}, "lists of a call must have one common length.*`negative_prompt` 2"),
        ({"image": [PIL.Image.new("RGB", (32, 32))] * 2, "description": ["a"] * 3}, "`image` 2, `description` 3"),
        ({"generator": [torch.Generator()] * 2}, r"`generator` as a list must hold .*\(3\), got 2"),
        ({"guidance_scale": [7.5, 2.0]}, r"`guidance_scale` must be one number or one per sample \(3\), got 2"),
        ({"latents": torch.zeros(2, 6, 8, 8)}, r"`latents` must be .*\(3, 6, 8, 8\), got \(2, 6, 8, 8\)"),
    ],
)
def test_batch_lengths_that_differ_are_refused_with_both(pipe, arguments, message):
    frames = [PIL.Image.new("RGB", (32, 32))] * 3
    refuse(pipe, message, **{"image": frames, **arguments})


# --- Numbers and tensors ------------------------------------------------------------------------------------------


def with_nan(*shape: int) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[0] = NAN
    return tensor


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image": with_nan(3, 32, 32)}, "image"),
        ({"image": with_nan(32, 32, 3).numpy()}, "image"),
        ({"latents": with_nan(1, 6, 8, 8)}, "latents"),
        ({"image_latents": with_nan(1, 6, 8, 8)}, "image_latents"),
        ({"negative_prompt_embeds": with_nan(1, 87, 32)}, "negative_prompt_embeds"),
        ({"description": None, "prompt_embeds": with_nan(1, 87, 32)}, "prompt_embeds"),
        (
            {"description": None, "enhancement": Enhancement("a", with_nan(4, 32), torch.zeros(3, 32))},
            "enhancement.image_embeds",
        ),
    ],
)
def test_nan_in_a_tensor_is_counted(pipe, arguments, name):
    refuse(pipe, f"`{name}` must be finite, got 1 NaN", **arguments)


@pytest.mark.parametrize("name", ["guidance_scale", "image_guidance_scale"])
@pytest.mark.parametrize("value", [NAN, INF, -0.5, [NAN], True, "7.5"])
def test_a_scale_that_is_not_finite_or_negative_is_refused_with_the_rule(pipe, name, value):
    refuse(pipe, f"`{name}` must be a finite number >= 0, got .*; 1 switches this guidance off", **{name: value})


@pytest.mark.parametrize("value", [0, -3])
def test_less_than_one_step_is_refused(pipe, value):
    refuse(pipe, f"`num_inference_steps` must be at least 1, got {value}", num_inference_steps=value)


@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_steps_that_are_no_integer_are_refused(pipe, value):
    refuse(pipe, "`num_inference_steps` must be an integer >= 1, got", TypeError, num_inference_steps=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt_embeds": torch.zeros(1, 87, 16)},
            r"`prompt_embeds` must be .*\(B, L, 32\), got \(1, 87, 16\).*; pass",
        ),
        ({"prompt_embeds": torch.zeros(87, 32)}, r"`prompt_embeds` must be .*\(B, L, 32\), got \(87, 32\)"),
        ({"prompt_embeds": torch.zeros(1, 9, 32)}, "`prompt_embeds` and `negative_prompt_embeds` must .*got 9 and 87"),
        (
            {"enhancement": Enhancement("a", torch.zeros(5, 32), torch.zeros(3, 32))},
            r"`enhancement.image_embeds` must be .*\(4, 32\), got \(5, 32\).*; use the VLM",
        ),
        (
            {"enhancement": Enhancement("a", torch.zeros(4, 32), torch.zeros(3, 16))},
            r"`enhancement.text_embeds` must be .*\(T, 32\), got \(3, 16\).*; use the VLM",
        ),
    ],
)
def test_embeddings_of_the_wrong_size_are_refused_with_the_right_one(pipe, arguments, message):
    refuse(pipe, message, **{"description": None, **arguments})


@pytest.mark.parametrize("name", ["latents", "image_latents"])
def test_latents_of_the_wrong_size_are_refused_with_the_right_one(pipe, name):
    refuse(pipe, rf"`{name}` must be .*6, .*got \(1, 4, 8, 8\).*; pass", **{name: torch.zeros(1, 4, 8, 8)})


# --- Components ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["warp", "cuda:99", "float16"])
def test_an_unknown_device_is_refused_with_the_known_ones(tiny_pipeline, device):
    with pytest.raises(ValueError, match=f"`device` must be .*got '{device}'.*\"cpu\""):
        tiny_pipeline.to(device)


def test_an_unknown_device_map_is_refused_with_the_known_ones(tiny_folder):
    with pytest.raises((ValueError, NotImplementedError), match="warp"):
        LegoPipeline.from_pretrained(tiny_folder, device_map="warp")


@pytest.mark.parametrize("dtype", ["float99", torch.int8])
def test_an_unknown_dtype_is_refused_with_the_known_ones(tiny_pipeline, tiny_folder, dtype):
    for call in (tiny_pipeline.to, lambda dtype: LegoPipeline.from_pretrained(tiny_folder, dtype=dtype)):
        with pytest.raises(ValueError, match='`dtype` must be .*got .*; pass "float32"'):
            call(dtype=dtype)


def test_a_missing_vlm_without_description_or_action_is_told_what_can_be_given(make_tiny_pipeline):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None)
    refuse(pipe, "must be given: `action`, `description` .*; got none of them", description=None)


def test_a_vlm_without_its_processor_is_told_what_can_be_done(make_tiny_pipeline):
    pipe = make_tiny_pipeline(vlm_processor=None)
    refuse(pipe, "must have a VLM, got .* without its processor; load", description=None, action=ACTION)


def test_a_pipeline_without_its_text_encoder_is_told_what_can_be_given(make_tiny_pipeline):
    pipe = make_tiny_pipeline(text_encoder=None)
    refuse(pipe, "`encode_prompt` must have a text encoder.*or pass `prompt_embeds`")


# --- Folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny pipeline to be broken."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def test_a_folder_that_is_no_checkpoint_is_told_what_makes_one(tmp_path):
    (tmp_path / "frame.png").touch()
    with pytest.raises(FileNotFoundError, match="must be the folder of a LegoPipeline, got .*; pass one written by"):
        LegoPipeline.from_pretrained(tmp_path)


def test_a_half_downloaded_folder_is_told_what_is_missing(folder):
    for path in (folder / "vae").iterdir():
        path.rename(path.with_suffix(".incomplete"))
    with pytest.raises(FileNotFoundError, match=r"vae` must hold `config\.json`, .*download the whole checkpoint"):
        LegoPipeline.from_pretrained(folder)


def test_corrupt_weights_are_named(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"unet/diffusion.*` must have \d+ bytes .*, got \d+; copy or download"):
        LegoPipeline.from_pretrained(folder)
