"""Storyboards: which frame each picture starts from, what is handed on, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.storyboard import paint_storyboard

ACTIONS = ["open drawer", "take spoon", "close drawer"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def same(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_each_picture_feeds_the_next(tiny_pipeline: LegoPipeline, frame: PIL.Image.Image) -> None:
    panels = paint_storyboard(tiny_pipeline, frame, ACTIONS, generator=seeded())
    generator, source = seeded(), frame
    for panel, action in zip(panels, ACTIONS, strict=True):
        expected = tiny_pipeline(source, action, generator=generator)
        assert panel.action == action
        assert panel.description == expected.descriptions[0]
        assert same(panel.image, expected.images[0])
        source = panel.image


def test_all_pictures_can_start_from_the_first_frame(tiny_pipeline: LegoPipeline, frame: PIL.Image.Image) -> None:
    panels = paint_storyboard(tiny_pipeline, frame, ACTIONS[:2], follow="first", generator=seeded())
    generator = seeded()
    expected = [tiny_pipeline(frame, action, generator=generator).images[0] for action in ACTIONS[:2]]
    assert all(same(panel.image, image) for panel, image in zip(panels, expected, strict=True))


def test_pictures_have_the_first_frames_size(
    tiny_pipeline: LegoPipeline, make_frame: Callable[..., PIL.Image.Image]
) -> None:
    panels = paint_storyboard(tiny_pipeline, make_frame(48, 36), ACTIONS[:2], generator=seeded())
    assert [panel.image.size for panel in panels] == [(48, 36)] * 2


def test_an_enhancement_can_come_from_elsewhere(
    make_tiny_pipeline: Callable[..., LegoPipeline], tiny_pipeline: LegoPipeline, frame: PIL.Image.Image
) -> None:
    without = make_tiny_pipeline(vlm=None, vlm_processor=None)
    asked: list[str] = []

    def enhance(source: Any, action: str, generator: torch.Generator | None) -> Any:
        asked.append(action)
        return tiny_pipeline.enhance(source, action, generator=generator)[0]

    panels = paint_storyboard(without, frame, ACTIONS[:2], enhance=enhance, generator=seeded())
    expected = paint_storyboard(tiny_pipeline, frame, ACTIONS[:2], generator=seeded())
    assert asked == ACTIONS[:2]
    assert [panel.description for panel in panels] == [panel.description for panel in expected]
    assert all(same(*pair) for pair in zip([p.image for p in panels], [p.image for p in expected], strict=True))


def test_arguments_of_the_call_are_handed_on(tiny_pipeline: LegoPipeline, frame: PIL.Image.Image) -> None:
    steps = []
    paint_storyboard(
        tiny_pipeline,
        frame,
        ACTIONS[:2],
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step) or {},
    )
    assert steps == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actions": []}, "`actions` must be a list of at least one action"),
        ({"actions": "open drawer"}, "`actions` must be a list of at least one action, got 'open drawer'"),
        ({"actions": ["open drawer", " "]}, "`actions` must say something, got ' '"),
        ({"follow": "last"}, "`follow` must be one of 'previous', 'first', got 'last'"),
    ],
)
def test_wrong_arguments_are_refused(
    tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paint_storyboard(tiny_pipeline, frame, **{"actions": ACTIONS, **arguments})


def test_two_frames_are_refused(tiny_pipeline: LegoPipeline, frame: PIL.Image.Image) -> None:
    with pytest.raises(ValueError, match="`image` must be one frame, got 2"):
        paint_storyboard(tiny_pipeline, [frame, frame], ACTIONS)
