"""Frames in and out: every kind of picture gives the right pixels or an error that says what to do."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import images


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_the_model_sees_its_own_area_in_the_aspect_of_the_frame():
    assert images.model_size(1080, 1920, 256, 8) == (192, 344)


def test_a_square_frame_is_seen_at_the_resolution():
    assert images.model_size(999, 999, 128, 16) == (128, 128)


def test_a_very_long_frame_keeps_one_latent_row():
    assert images.model_size(8, 9000, 128, 16)[0] == 16


@pytest.mark.parametrize("kind", ["numpy", "tensor", "float_numpy", "float_tensor"])
def test_all_kinds_of_input_give_the_same_pixels(pixels, kind):
    inputs = {
        "numpy": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "float_numpy": pixels / 255,
        "float_tensor": torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    }
    expected = images.to_model_input(PIL.Image.fromarray(pixels), 12, 16)
    torch.testing.assert_close(images.to_model_input(images.to_frames(inputs[kind])[0], 12, 16), expected)


def test_tensors_are_resized_like_pil_images(pixels):
    smooth = PIL.Image.fromarray(pixels).resize((64, 48), PIL.Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(smooth)).permute(2, 0, 1) / 255
    difference = images.to_model_input(smooth, 24, 40) - images.to_model_input(tensor, 24, 40)
    assert difference.abs().max() < 2.5 / 127.5


def test_a_batched_array_is_split(pixels):
    assert len(images.to_frames(np.stack([pixels, pixels]))) == 2


def test_a_list_may_mix_kinds_and_sizes(pixels):
    frames = images.to_frames([PIL.Image.fromarray(pixels), torch.rand(2, 3, 9, 9)])
    assert [images.frame_size(frame) for frame in frames] == [(12, 16), (9, 9), (9, 9)]


def test_pixels_survive_the_way_to_the_model_and_back(pixels):
    image = PIL.Image.fromarray(pixels)
    back = images.convert(images.from_model_output(images.to_model_input(image, 12, 16)[None]), "pil")[0]
    assert np.array_equal(np.array(back), pixels)


@pytest.mark.parametrize(("output_type", "shape"), [("np", (12, 16, 3)), ("pt", (3, 12, 16))])
def test_outputs_hold_values_between_zero_and_one(pixels, output_type, shape):
    output = images.convert(images.from_model_output(torch.full((1, 3, 12, 16), 3.0)), output_type)[0]
    assert tuple(output.shape) == shape and output.min() == output.max() == 1


def test_outputs_are_resized_to_the_sizes_that_are_asked_for():
    outputs = images.convert(images.from_model_output(torch.zeros(2, 3, 16, 16), [(8, 9), (20, 30)]), "pil")
    assert [output.size for output in outputs] == [(9, 8), (30, 20)]


def test_arrays_of_different_sizes_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match='output_type="pil"'):
        images.stack_images([np.zeros((8, 8, 3)), np.zeros((9, 8, 3))], "np")


def test_transparent_pixels_are_laid_on_white():
    image = PIL.Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert images.to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_transparency_is_laid_on_white():
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.info["transparency"] = 0
    assert images.to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    image = PIL.Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert images.to_rgb(image).getpixel((0, 0)) == (128, 128, 128)


def test_a_sixteen_bit_array_is_scaled(pixels):
    frame = images.to_frames(pixels.astype(np.uint16) * 257)[0]
    assert np.array_equal(np.array(frame), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_other_mode_becomes_rgb(pixels, mode):
    assert images.to_rgb(PIL.Image.fromarray(pixels).convert("RGB" if mode == "LAB" else mode)).mode == "RGB"


def test_the_exif_orientation_is_applied(tmp_path, pixels):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    path = tmp_path / "turned.png"
    PIL.Image.fromarray(pixels).save(path, exif=exif)
    assert np.array_equal(np.array(images.read_image(path)), np.rot90(pixels, -1))


def test_a_100_megapixel_image_is_read_without_a_warning(tmp_path):
    path = tmp_path / "large.png"
    PIL.Image.new("L", (10_000, 10_000)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.read_image(path).size == (10_000, 10_000)


def test_an_image_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png must be a file, found nothing"):
        images.read_image(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "an empty file"), (b"no picture", "of a format that Pillow reads")]
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.png must .*{message}"):
        images.read_image(tmp_path / "bad.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_file_is_named(tmp_path, pixels, suffix):
    path = tmp_path / f"cut.{suffix}"
    PIL.Image.fromarray(pixels).resize((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} must be"):
        images.read_image(path)


def test_an_image_that_was_opened_and_is_truncated_is_named(tmp_path, pixels):
    path = tmp_path / "cut.jpg"
    PIL.Image.fromarray(pixels).resize((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with PIL.Image.open(path) as image, pytest.raises(ValueError, match=r"cut\.jpg` must be complete"):
        images.to_frames(image)


@pytest.mark.parametrize(
    "image",
    [PIL.Image.new("RGB", (1, 1)), np.zeros((1, 1, 3), np.uint8), torch.zeros(3, 1, 1), PIL.Image.new("L", (7, 900))],
)
def test_a_picture_of_a_pixel_is_no_frame(image):
    with pytest.raises(ValueError, match="at least 8 pixels"):
        images.to_frames(image)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 12, 16)), np.zeros((0, 12, 3)), torch.zeros(12, 16, 3), torch.zeros(1, 1, 3, 9, 9)]
)
def test_a_wrong_shape_is_refused_with_the_right_ones(image):
    with pytest.raises(ValueError, match=r"`image` as an? (array|tensor) must be .*got"):
        images.to_frames(image)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted(value):
    image = torch.zeros(3, 9, 9)
    image[0, 0, 0] = value
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        images.to_frames(image)


@pytest.mark.parametrize("image", [torch.full((3, 9, 9), -1.0), np.full((9, 9, 3), 255.0)])
def test_floats_outside_zero_and_one_are_refused_with_the_range(image):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got \[(-1|255)"):
        images.to_frames(image)


@pytest.mark.parametrize("image", [np.zeros((9, 9, 3), np.int64), torch.zeros(3, 9, 9, dtype=torch.int64)])
def test_integers_of_unknown_range_are_refused(image):
    with pytest.raises(ValueError, match="got .*int64"):
        images.to_frames(image)


def test_a_path_is_answered_with_how_to_read_it():
    with pytest.raises(TypeError, match=r"read_image\('frame.jpg'\)"):
        images.to_frames("frame.jpg")


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        images.to_frames([])


def test_float_modes_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="got mode F"):
        images.to_rgb(PIL.Image.new("F", (9, 9)))


def test_a_small_frame_warns_once_with_both_sizes():
    with pytest.warns(UserWarning, match="from 20x10 to 64x32") as caught:
        images.warn_of_enlargement([(10, 20), (10, 20)], [(32, 64), (32, 64)], False)
    assert len(caught) == 1


def test_a_result_that_is_blown_up_warns_with_both_sizes():
    with pytest.warns(UserWarning, match="from 32x32 to 100x100"):
        images.warn_of_enlargement([(100, 100)], [(32, 32)], True)


def test_a_result_that_is_left_small_does_not_warn():
    images.warn_of_enlargement([(100, 100)], [(32, 32)], False)
