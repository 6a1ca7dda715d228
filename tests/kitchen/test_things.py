"""Things: each stands on the ground and says how it is held."""

import numpy as np
import pytest

from examples.kitchen.things import COLOURS, MAKERS, pick


@pytest.fixture(params=MAKERS)
def thing(request):
    return MAKERS[request.param](np.random.default_rng(0))


def test_a_thing_stands_on_the_ground_or_is_a_tool_around_its_grip(thing):
    lowest = min(part.vertices[:, 2].min() for part in thing.parts)
    assert (-0.03 < lowest < 0.0) if thing.held == "tool" else (-0.008 < lowest < 0.02)


def test_a_thing_is_as_high_as_it_says(thing):
    highest = max(part.vertices[:, 2].max() for part in thing.parts)
    assert abs(highest - thing.height) < 0.03


def test_a_thing_is_held_in_a_known_way(thing):
    assert thing.held in ("side", "rim", "handle", "tool", "top")
    assert (thing.handle is not None) == (thing.held == "handle")


def test_the_same_generator_state_makes_the_same_thing():
    first, second = (MAKERS["plant"](np.random.default_rng(4)) for _ in range(2))
    assert all(np.array_equal(a.vertices, b.vertices) for a, b in zip(first.parts, second.parts, strict=True))


def test_a_colour_is_picked_among_the_allowed_ones():
    rng = np.random.default_rng(0)
    picked = {pick(rng, ("red", "teal")) for _ in range(20)}
    assert picked == {(COLOURS["red"], "red"), (COLOURS["teal"], "teal")}
