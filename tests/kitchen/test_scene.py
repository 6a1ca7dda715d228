"""Pairs of the kitchen: what is written down about a frame is what the frame shows."""

import numpy as np
import pytest

from examples.kitchen.actions import ACTIONS, HELD_OUT_ACTIONS, TRAIN_ACTIONS
from examples.kitchen.raytrace import trace
from examples.kitchen.scene import SMALLEST_BOX, SPLITS, build, sample

SIZE = 48
# Things that are there before and during every action whose label names them.
STANDING = ("cup", "bowl", "pan", "plate", "bottle", "pot", "carrot")
# What to look for where a label names something without a part of that name.
PART_OF = {"cupboard": "cupboard door", "fridge": "fridge door", "tap": "tap handle", "hob": "hot plate",
           "water": "bottle", "counter": "spill", "hands": "hand_"}  # fmt: skip
# Frames in which it is not to be seen, 0 before and 1 during the action: what is closed or cold has no part of its
# own there, it is drawn with the room.
WITHOUT_PART = {"open drawer": 0, "open cupboard": 0, "open fridge": 0, "turn on hob": 0, "turn off hob": 1}
# Actions that move nothing but the hands.
HANDS_ONLY = ("wash hands",)


def pair(action: str, index: int = 0, **options) -> dict:
    return sample(11, index, size=SIZE, actions=(action,), **options)


def pixels(box: list[float]) -> tuple[slice, slice]:
    x0, y0, x1, y1 = (round(edge * SIZE) for edge in box)
    return slice(y0, y1), slice(x0, x1)


def named(scene, moment: int, size: int = SIZE) -> np.ndarray:
    """Names of the parts at each pixel (size, size)."""
    _, part_map, names = trace(scene.parts[moment], scene.cameras[moment], scene.shot.kitchen.light, size)
    return np.array([*names, ""])[part_map]


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_builds_and_shows_its_hands(action):
    result = pair(action)
    assert result["label"] == action == f"{result['slots']['verb']} {result['slots']['noun']}"
    assert result["before"].shape == result["target"].shape == (SIZE, SIZE, 3)
    assert result["hands_target"]
    assert all(f"hand_{side}" in result["boxes_target"] for side in result["hands_target"])
    assert result["description"].endswith(".")


@pytest.mark.parametrize("action", [action for action in ACTIONS if action not in HANDS_ONLY])
def test_the_action_changes_its_things_apart_from_hands_and_camera(action):
    result = pair(action, motion=0.0, hands_seen=0.0, show_hands=False)
    changed = np.abs(result["before"].astype(int) - result["target"]).max(-1)
    boxes = [*result["boxes_before"].items(), *result["boxes_target"].items()]
    in_boxes = [changed[pixels(box)].max() for name, box in boxes if not name.startswith("hand_")]
    assert max(in_boxes) > 40


def test_washing_hands_brings_both_hands_under_the_water():
    result = pair("wash hands")
    x0, y0, x1, y1 = result["boxes_target"]["water"]
    for side in ("right", "left"):
        a0, b0, a1, b1 = result["boxes_target"][f"hand_{side}"]
        assert a0 < x1 and x0 < a1 and b0 < y1 and y0 < b1


@pytest.mark.parametrize("index", range(6))
def test_boxes_contain_exactly_the_rendered_hands(index):
    options = {"actions": TRAIN_ACTIONS + HELD_OUT_ACTIONS, "motion": 0.35}
    boxes = sample(12, index, size=SIZE, **options)["boxes_target"]
    shown, hidden = (named(build(12, index, show_hands=hands, **options), 1) for hands in (True, False))
    hands = shown != hidden  # what the hands cover, found without their names
    outside = hands.copy()
    for name, box in boxes.items():
        if name.startswith("hand_"):
            outside[pixels(box)] = False
            inside = (shown == name)[pixels(box)]
            assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all()  # no edge could move inwards
    assert outside.sum() < SMALLEST_BOX


@pytest.mark.parametrize("action", [a for a in TRAIN_ACTIONS + HELD_OUT_ACTIONS if ACTIONS[a].noun in STANDING])
def test_the_thing_that_the_label_names_is_visible_in_both_frames(action):
    result = sample(11, 1, size=96, actions=(action,))
    noun = ACTIONS[action].noun
    assert noun in result["boxes_before"] and noun in result["boxes_target"]


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("action", [a for a in TRAIN_ACTIONS + HELD_OUT_ACTIONS if ACTIONS[a].noun not in STANDING])
def test_what_stands_for_the_label_is_visible_but_where_the_room_draws_it(action, moment):
    noun = ACTIONS[action].noun
    shown = np.unique(named(build(11, 1, actions=(action,)), moment, size=96))
    is_shown = any(name.startswith(PART_OF.get(noun, noun)) for name in shown)
    assert is_shown == (WITHOUT_PART.get(action) != moment)


@pytest.mark.parametrize("action", ["open drawer", "close cupboard", "open fridge"])
def test_an_open_door_or_drawer_has_a_box_and_a_closed_one_has_none(action):
    result = pair(action)
    part = {"drawer": "drawer", "cupboard": "cupboard door", "fridge": "fridge door"}[ACTIONS[action].noun]
    assert part in result["boxes_target"]
    assert (part in result["boxes_before"]) == action.startswith("close")


def test_descriptions_say_which_hand_is_shown():
    for index in range(8):
        result = sample(13, index, size=16)
        if result["slots"]["hand"] != "both":
            assert result["hands_target"] == [result["slots"]["hand"]]
            assert result["slots"]["hand"] in result["description"]


def test_the_same_seed_gives_the_same_pair():
    first, second = (sample(5, 2, size=SIZE) for _ in range(2))
    assert np.array_equal(first.pop("before"), second.pop("before"))
    assert np.array_equal(first.pop("target"), second.pop("target"))
    assert first == second


def test_an_unknown_action_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="`actions` must be among take cup, .*; got fly kite"):
        sample(1, 0, actions=("take cup", "fly kite"))


def test_splits_share_no_kitchen():
    kitchens = [set(range(s.first_kitchen, s.first_kitchen + s.kitchens)) for s in SPLITS.values()]
    assert sum(map(len, kitchens)) == len(set.union(*kitchens))


def test_training_never_shows_a_held_out_combination():
    assert not set(HELD_OUT_ACTIONS) & set(SPLITS["train"].actions)
    assert set(HELD_OUT_ACTIONS) <= set(SPLITS["val"].actions) & set(SPLITS["test"].actions)


@pytest.mark.parametrize("action", HELD_OUT_ACTIONS)
def test_verb_and_noun_of_a_held_out_action_occur_in_training(action):
    trained = [ACTIONS[name] for name in TRAIN_ACTIONS]
    assert ACTIONS[action].verb in {a.verb for a in trained} and ACTIONS[action].noun in {a.noun for a in trained}
