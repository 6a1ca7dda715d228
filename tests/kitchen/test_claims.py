"""What a sentence claims is what it was composed from."""

import pytest

from examples.kitchen.actions import ACTIONS
from examples.kitchen.claims import claims_of, false_claims
from examples.kitchen.scene import build

LIFT = "With the right hand I grip the red cup on the left of the counter around its side and lift it up toward me."
SLOTS = {"hand": "right", "place": "left"}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_true_description_claims_its_slots_and_nothing_false(action):
    for index in range(4):
        shot = build(12, index, actions=(action,)).shot
        claims = claims_of(shot.description)
        assert claims.hand == shot.slots["hand"]
        assert claims.place in (None, shot.slots["place"])
        assert claims.things
        assert not false_claims(shot.description, shot.description, shot.slots)


def test_places_are_read_where_the_words_say_them():
    said = {
        action: claims_of(build(12, 0, actions=(action,)).shot.description).place is not None
        for action in ("take cup", "put bottle", "open drawer", "close cupboard", "turn on hob", "put pan", "stir pot")
    }
    assert said == {
        "take cup": True,
        "put bottle": True,
        "open drawer": True,
        "close cupboard": True,
        "turn on hob": True,
        "put pan": False,
        "stir pot": False,
    }


def test_the_colour_is_read():
    assert claims_of(LIFT).colour == "red"
    assert claims_of(LIFT.replace("red ", "")).colour is None


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("right hand", "left hand", ["hand"]),
        ("on the left", "on the right", ["place"]),
        ("red", "blue", ["colour"]),
        ("cup", "bowl", ["things"]),
        ("the right hand", "both hands", ["hand"]),
        ("red cup on the left of the counter", "cup", []),
        (LIFT, "", []),
    ],
)
def test_what_contradicts_the_scene_is_false_and_what_is_left_out_is_not(old, new, wrong):
    assert false_claims(LIFT.replace(old, new), LIFT, SLOTS) == wrong


def test_a_place_that_the_true_sentence_leaves_out_is_known_all_the_same():
    truth = "With the right hand I set the lid on the pot."
    written = "With the right hand I set the lid on the pot on the left of the counter."
    assert false_claims(written, truth, {"hand": "right", "place": "left"}) == []
    assert false_claims(written, truth, {"hand": "right", "place": "right"}) == ["place"]
