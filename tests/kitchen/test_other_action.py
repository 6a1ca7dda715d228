"""Two actions in one scene: the frame before is the same, the frame after shows the other action."""

import numpy as np
import pytest

from examples.kitchen import other_action as module
from examples.kitchen.actions import HELD_OUT_ACTIONS
from examples.kitchen.geom import Material, box
from examples.kitchen.other_action import OtherActionConfig, main, other_action, other_row
from examples.kitchen.scene import build, shoot
from lego_pipeline.data.manifest import read_manifest


def scenes(action: str, count: int = 4):
    """Pairs of scenes, the second with another action in the first."""
    pairs = []
    for index in range(count):
        scene = build(13, index, actions=(action,))
        other = other_action(scene, 13, index)
        if other is not None:
            pairs.append((scene, other))
    return pairs


@pytest.mark.parametrize("action", ["take cup", "turn on tap", "stir pot"])
def test_the_frame_before_is_the_same_and_the_frame_after_is_not(action):
    scene, other = scenes(action)[0]
    assert other.action != action
    first, second = shoot(scene, 48), shoot(other, 48)
    assert np.array_equal(first["before"], second["before"])
    assert np.abs(first["target"].astype(int) - second["target"]).max() > 60
    assert second["label"] == other.action == f"{second['slots']['verb']} {second['slots']['noun']}"
    assert any(name.startswith("hand_") for name in second["boxes_target"])


def test_the_cook_stays_where_the_cook_is():
    for scene, other in scenes("take plate"):
        assert (scene.shot.view, scene.shot.station) == (other.shot.view, other.shot.station)
        assert scene.kitchen == other.kitchen
        assert scene.cameras is other.cameras


def test_the_first_actions_thing_stays_on_the_counter():
    scene, other = scenes("take bottle")[0]
    names = {part.name for part in scene.shot.before.parts}
    assert "bottle" in names
    assert names <= {part.name for part in other.parts[1]}


def test_things_that_reach_into_one_another_collide():
    block, material = (0.0, 0.0, 0.0), Material((0.5, 0.5, 0.5))
    first = [box(block, (1.0, 1.0, 1.0), material)]
    assert module._collide(first, [box((0.9, 0.9, 0.9), (2.0, 2.0, 2.0), material)])
    assert not module._collide(first, [box((0.9, 0.9, 1.0), (2.0, 2.0, 2.0), material)])  # stands on it
    assert not module._collide(first, [])


def test_bystanders_of_the_second_scene_do_not_appear():
    for scene, other in scenes("wipe counter"):
        allowed = {part.name for part in scene.parts[0]}
        assert {part.name for part in other.parts[1] if part.name.startswith("other")} <= allowed


@pytest.mark.parametrize("action", ["put cup", "close pot", "open drawer", "close fridge", "open cupboard"])
def test_hands_that_carry_something_and_views_of_one_action_have_no_other(action):
    assert not scenes(action)


def test_nothing_that_runs_or_glows_is_undone_by_chance():
    for _, other in scenes("turn on tap", 10):
        assert other.action not in ("turn off tap", "wash hands")  # both begin with running water


def test_the_same_pair_gives_the_same_frame():
    index = next(i for i in range(20) if other_row("test", i, 32) is not None)
    first, second = other_row("test", index, 32), other_row("test", index, 32)
    assert first["id"] == second["id"] == f"kitchen-test-{index:07d}"
    assert first["action"] == second["action"]
    assert np.array_equal(np.asarray(first["image_1"]), np.asarray(second["image_1"]))


def test_the_judges_pairs_are_of_training_kitchens_and_resumable(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 3)
    config = OtherActionConfig(out=tmp_path, pairs=6, size=32)
    main(config)
    files = sorted(tmp_path.glob("*.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    main(config)
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 2
    rows = read_manifest(tmp_path, "train")
    assert len(set(rows["id"][:])) == 6
    assert all(int(video.removeprefix("kitchen-")) < 256 for video in rows["video"][:])
    assert all(action in HELD_OUT_ACTIONS for action in rows["action"][::2])


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="`pairs`"):
        OtherActionConfig(out=".", pairs=0)
