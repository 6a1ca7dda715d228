"""The room: handles are where the hand is sent, and only what is asked for is open."""

import numpy as np
import pytest

from examples.kitchen.room import PLATES, Kitchen


@pytest.fixture(scope="module", params=[0, 1])
def kitchen(request):
    """A kitchen and a mirrored one."""
    return Kitchen(request.param)


def distance(parts, name: str, point: np.ndarray) -> float:
    """Metres from a point to the nearest vertex of the parts of that name, which are tubes at their handles."""
    return min(np.linalg.norm(part.vertices - point, axis=1).min() for part in parts if part.name == name)


def names(parts) -> set[str]:
    return {part.name for part in parts}


def test_the_two_kitchens_of_these_tests_are_mirrored():
    assert Kitchen(0).x["sink"] == -Kitchen(1).x["sink"]


def test_the_same_seed_gives_the_same_kitchen():
    first, second = (Kitchen(3).build() for _ in range(2))
    assert all(np.array_equal(a.vertices, b.vertices) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("column", [0, 1])
def test_the_hand_is_sent_to_the_handle_of_an_open_drawer(kitchen, column):
    parts = kitchen.build(drawers={("hob", column): 0.2})
    assert distance(parts, "drawer", kitchen.drawer_handle("hob", column, 0.2)) < 0.08  # half the handle's length


@pytest.mark.parametrize("column", [0, 1])
def test_the_hand_is_sent_to_the_handle_of_an_open_cupboard(kitchen, column):
    parts = kitchen.build(cupboard=("prep", column, 45.0))
    assert distance(parts, "cupboard door", kitchen.cupboard_handle("prep", column, 45.0)) < 0.08


def test_the_hand_is_sent_to_the_handle_of_an_open_fridge(kitchen):
    assert distance(kitchen.build(fridge=40.0), "fridge door", kitchen.fridge_handle(40.0)) < 0.21


@pytest.mark.parametrize("on", [False, True])
def test_the_hand_is_sent_to_the_lever_of_the_tap(kitchen, on):
    assert distance(kitchen.build(tap=on), "tap handle", kitchen.tap_lever(on)) < 0.02


def test_nothing_is_open_or_on_unless_it_is_asked_for(kitchen):
    assert names(kitchen.build()) == {"world", "tap handle"}


@pytest.mark.parametrize("plate", range(len(PLATES)))
def test_one_plate_glows_and_one_knob_is_turned(kitchen, plate):
    parts = kitchen.build(hob=plate)
    assert names(parts) == {"world", "tap handle", "hot plate", "knob"}
    hot = np.concatenate([part.vertices for part in parts if part.name == "hot plate"])
    x, y, _ = PLATES[plate]
    assert np.allclose((hot.min(0) + hot.max(0))[:2] / 2, [kitchen.x["hob"] + x, y], atol=0.01)
