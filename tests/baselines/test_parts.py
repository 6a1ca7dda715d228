"""Parts of LEGO's condition: what is left out is zero, the rest is LEGO's own."""

from collections.abc import Callable

import PIL.Image
import pytest
import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.baselines.parts import PARTS, condition_of_parts

IMAGE, TEXT = slice(77, 81), slice(81, None)


def condition(pipeline: LegoPipeline, parts: str, frames: list[PIL.Image.Image]) -> tuple[torch.Tensor, list[str]]:
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with torch.no_grad():
        return condition_of_parts(pipeline, parts, frames, ["open drawer", "take cup"], generators=seeds)


@pytest.mark.parametrize(
    ("parts", "zeroed"),
    [("description", (IMAGE, TEXT)), ("description+image", (TEXT,)), ("description+text", (IMAGE,)), (PARTS[-1], ())],
)
def test_parts_that_are_left_out_are_zero_and_the_others_are_lego_s(
    parts: str, zeroed: tuple[slice, ...], tiny_pipeline: LegoPipeline, make_frame: Callable
) -> None:
    frames = [make_frame(32, 32, seed) for seed in (0, 1)]
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with torch.no_grad():
        enhancements = tiny_pipeline.enhance(frames, ["open drawer", "take cup"], generator=seeds)
        expected = tiny_pipeline.encode_condition(enhancements)[0].clone()
    assert expected[:, IMAGE].any() and expected[:, TEXT].any()
    for place in zeroed:
        expected[:, place] = 0
    found, texts = condition(tiny_pipeline, parts, frames)
    assert torch.equal(found, expected)
    assert texts == [item.description for item in enhancements]


def test_the_label_alone_needs_no_vlm(make_tiny_pipeline: Callable, make_frame: Callable) -> None:
    pipeline = make_tiny_pipeline(vlm=None, vlm_processor=None)
    found, texts = condition(pipeline, "label", [make_frame(32, 32)] * 2)
    assert texts == ["open drawer", "take cup"]
    with torch.no_grad():
        assert torch.equal(found, pipeline.encode_condition(description=texts)[0])


def test_unknown_parts_are_refused(tiny_pipeline: LegoPipeline) -> None:
    with pytest.raises(ValueError, match="`parts` must be one of label, description"):
        condition_of_parts(tiny_pipeline, "image", [], [])
