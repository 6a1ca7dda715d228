"""The judge that travels with the package, on frames of kitchens that its training never saw."""

import math
from dataclasses import replace

import pytest
import torch

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.judge import (
    NOTHING,
    WEIGHTS,
    Judge,
    box_corners,
    box_overlap,
    load_judge,
    save_judge,
)
from lego_pipeline.images import to_model_input

ACTIONS = [("open", "drawer"), ("take", "cup"), ("turn on", "tap")]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def rows():
    return read_manifest(FRAMES)


@pytest.fixture(scope="module")
def frames(rows) -> torch.Tensor:
    """(2, N, 3, 128, 128) float in [-1, 1]: the frames before and after."""
    return torch.stack([
        torch.stack([to_model_input(picture, 128, 128) for picture in rows[f"image_{k}"][:]]) for k in (0, 1)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def readings(judge, frames):
    return judge.read(*frames)


def small_judge() -> Judge:
    torch.manual_seed(0)
    return Judge(ACTIONS, ["left", "right"], size=32, widths=(4, 4, 8, 8), hidden=8).eval()


def test_the_weights_are_small():
    assert WEIGHTS.stat().st_size <= 2 * 2**20


def test_it_names_the_action_of_true_frames(readings, rows):
    right = [reading.action == action for reading, action in zip(readings, rows["action"][:], strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_it_names_the_action_of_few_copied_frames(judge, frames, rows):
    copies = judge.read(frames[0], frames[0])
    for name, most in (("action", 0.2), ("best_action", 0.2)):
        right = [getattr(copy, name) == action for copy, action in zip(copies, rows["action"][:], strict=True)]
        assert sum(right) / len(right) <= most
    assert sum(reading.action == NOTHING for reading in copies) / len(copies) >= 0.9


def test_it_sees_the_hands_and_the_boxes(readings, rows):
    seen, overlaps = [], []
    for reading, boxes in zip(readings, rows["boxes_1"][:], strict=True):
        truth = box_corners(boxes)
        sides = [side for side, box in zip(("left", "right"), truth, strict=False) if not box.isnan().any()]
        seen.append(list(reading.hands) == sides)
        overlaps.append(box_overlap(torch.tensor(reading.boxes["object"]), truth[-1]).item())
    assert sum(seen) / len(seen) >= 0.9
    assert sum(overlaps) / len(overlaps) >= 0.5


def test_a_reading_does_not_depend_on_the_batch(judge, frames, readings):
    alone = judge.read(frames[0, 3:4], frames[1, 3:4])[0]
    assert alone.action == readings[3].action
    for name, probability in alone.probabilities.items():
        assert probability == pytest.approx(readings[3].probabilities[name], abs=1e-4)
    rest = {"probabilities": {}, "boxes": {}}
    assert replace(alone, **rest) == replace(readings[3], **rest)


def test_frames_of_another_size_are_resized(judge, frames, readings):
    large = torch.nn.functional.interpolate(frames[:, 0], scale_factor=2, mode="bilinear")
    assert judge.read(large[:1], large[1:])[0].action == readings[0].action


def test_probabilities_are_those_of_all_answers():
    reading = small_judge().read(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))[0]
    assert list(reading.probabilities) == ["open drawer", "take cup", "turn on tap", NOTHING]
    assert sum(reading.probabilities.values()) == pytest.approx(1)
    assert reading.best_action != NOTHING


def test_only_hands_that_are_seen_have_boxes():
    judge = small_judge()
    with torch.no_grad():
        judge.heads["hands"].bias.copy_(torch.tensor([-100.0, 100.0]))
    reading = judge.read(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))[0]
    assert reading.hands == ("right",)
    assert set(reading.boxes) == {"hand_right", "object"}
    x0, y0, x1, y1 = reading.boxes["object"]
    assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("shapes", [((3, 32, 32), (3, 32, 32)), ((1, 3, 32, 32), (2, 3, 32, 32))])
def test_frames_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="`before` and `after`"):
        small_judge().read(*(torch.zeros(shape) for shape in shapes))


def test_a_saved_judge_comes_back(tmp_path):
    judge = small_judge().half().float()  # values that half precision holds
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.settings == judge.settings and not loaded.training
    before, after = torch.rand(2, 2, 3, 32, 32)
    for name, value in loaded(before, after).items():
        assert torch.equal(value, judge(before, after)[name])
    assert [path.name for path in tmp_path.iterdir()] == ["judge.safetensors"]


def test_missing_and_foreign_weights_are_said(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="train_judge"):
        load_judge(tmp_path / "judge.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must hold a judge"):
        load_judge(tmp_path / "other.safetensors")


def test_things_are_joined_and_hands_kept_apart():
    boxes = [
        {"name": "hand_right", "x0": 0.5, "y0": 0.5, "x1": 0.9, "y1": 1.0},
        {"name": "cup", "x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 0.4},
        {"name": "water", "x0": 0.2, "y0": 0.1, "x1": 0.6, "y1": 0.3},
    ]
    left, right, thing = box_corners(boxes)
    assert left.isnan().all()
    torch.testing.assert_close(right, torch.tensor([0.5, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(thing, torch.tensor([0.1, 0.1, 0.6, 0.4]))


@pytest.mark.parametrize(
    ("second", "expected"),
    [((0, 0, 1, 1), 1), ((0.5, 0, 1.5, 1), 1 / 3), ((1, 1, 2, 2), 0), ((0.9, 0.5, 0.1, 0.5), 0)],
)
def test_overlap_is_intersection_over_union(second, expected):
    first = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert box_overlap(first, torch.tensor(second)).item() == pytest.approx(expected)


def test_overlap_with_a_missing_box_is_missing():
    assert math.isnan(box_overlap(torch.full((4,), math.nan), torch.tensor([0.0, 0.0, 1.0, 1.0])).item())
