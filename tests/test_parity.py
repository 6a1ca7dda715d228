"""What the release does to frames and pictures; the arrays of the release itself are compared under tests/parity."""

import io
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import parity
from lego_pipeline.parity import (
    chunk_generators,
    chunk_starts,
    released_jpeg,
    released_path,
    released_picture,
    released_resize,
    squeeze,
)

SHAPE = (1, 2, 4, 4)


def test_a_frame_is_squeezed_to_a_square_whatever_its_aspect(make_frame: Callable[..., PIL.Image.Image]) -> None:
    frame = make_frame(64, 32)
    assert squeeze(frame, 16).size == (16, 16)
    assert squeeze(frame, 16).tobytes() == frame.resize((16, 16), PIL.Image.Resampling.LANCZOS).tobytes()


def test_a_picture_keeps_its_height_and_gets_the_aspect_of_its_clip() -> None:
    decoded = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2
    assert released_resize(decoded, 1440, 1080).shape == (3, 64, 85)
    assert torch.equal(released_resize(decoded, 64, 64), decoded)  # nothing is clamped


def test_contrast_is_stretched_and_fractions_are_cut_off() -> None:
    decoded = torch.tensor([-3.0, -1.0, 0.99, 1.0]).reshape(1, 2, 2).expand(3, 2, 2)
    picture = np.asarray(released_picture(decoded, 2, 2))
    assert picture[..., 0].ravel().tolist() == [0, 127, 254, 255]


def test_a_picture_of_one_colour_is_black_and_no_error() -> None:
    assert np.asarray(released_picture(torch.ones(3, 2, 2), 2, 2)).max() == 0


def test_a_jpeg_has_quality_75_and_colours_at_half_resolution(make_frame: Callable[..., PIL.Image.Image]) -> None:
    frame, default = make_frame(32, 32), io.BytesIO()
    frame.save(default, "JPEG")
    assert released_jpeg(frame) == default.getvalue()  # Pillow's defaults have not changed since
    assert PIL.Image.open(io.BytesIO(released_jpeg(frame))).layer[0][1:3] == (2, 2)


def test_the_path_has_three_parts_of_the_targets_and_no_text_scale() -> None:
    path = released_path("ego4d", 0, 100, 1.5, "EgoGen/val/clip/action/frame.jpg")
    assert str(path) == "ego4d-e=0-s=100-si=1.5/images/clip/action/frame.jpg"


@pytest.mark.parametrize(("count", "starts"), [(8, list(range(9))), (5, [0, 0, 1, 1, 2, 3, 3, 4, 5]), (0, [0] * 9)])
def test_chunks_start_where_the_releases_do(count: int, starts: list[int]) -> None:
    assert chunk_starts(count) == starts == [int(k * count / 8) for k in range(9)]


def test_every_sample_has_the_numbers_that_one_stream_for_its_chunk_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "CHUNKS", 2)
    generators = list(chunk_generators(5, seed=7, shape=SHAPE, draws=3))
    found = [[torch.randn(SHAPE, generator=generator) for _ in range(3)] for generator in generators]
    for first, end in ((0, 2), (2, 5)):
        stream = torch.Generator().manual_seed(7)
        for sample in range(first, end):
            for noise in found[sample]:
                assert torch.equal(noise, torch.randn(SHAPE, generator=stream))
