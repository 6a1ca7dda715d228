"""What a description of the kitchen claims: hand, place, colour and things, read back from the sentence.

The sentences of `actions.py` are composed from values, so the values can be found in them again, in the true sentence
and in one that a VLM wrote.
"""

import re
from dataclasses import dataclass

from examples.kitchen.render import COLOURS

PLACES = (  # patterns whose first group names the place as the slot does
    r"on the (left|right) of the counter",
    r"in the (middle) of the counter",
    r"the (left|right) drawer",
    r"the (left|right) cupboard door",
    r"(knob \d) of the hob",
)
# "counter" and "hob" say where; "hand" and "fingers" are no things.
THINGS = (
    *("apple", "board", "bottle", "bowl", "bread", "butter", "carrot", "carton", "cloth", "cucumber", "cup"),
    *("cupboard", "drawer", "egg", "fridge", "jar", "knife", "knob", "lid", "milk", "pan", "peeler", "plate", "pot"),
    *("salt", "shaker", "sponge", "spoon", "spill", "tap", "toast", "water"),
)


@dataclass(frozen=True)
class Claims:
    """What a sentence says.

    Attributes:
        hand: left, right, both, or None.
        place: as the slot `place`: left, middle, right, knob 1 to 4; None where the sentence doesn't say.
        colour: of the first thing that has one, or None.
        things: all that are named.
    """

    hand: str | None
    place: str | None
    colour: str | None
    things: frozenset[str]


def claims_of(text: str) -> Claims:
    """Reads a sentence; what it says twice counts as it comes first."""
    words = re.findall(r"[a-z]+", text.lower())
    sides = {side for side in ("left", "right") if f"{side} hand" in text}
    is_both = len(sides) == 2 or "both hands" in text
    places = sorted((found.start(), found.group(1)) for pattern in PLACES for found in re.finditer(pattern, text))
    return Claims(
        hand="both" if is_both else next(iter(sides), None),
        place=places[0][1] if places else None,
        colour=next((word for word in words if word in COLOURS), None),
        things=frozenset(words) & frozenset(THINGS),
    )


def false_claims(written: str, truth: str, slots: dict) -> list[str]:
    """Names of what a description says and what isn't so: hand, place, colour, things.

    What it leaves out is not false.

    Args:
        written: to be judged.
        truth: the true description of the pair.
        slots: of its manifest row; they hold the hand and the place even where the true description leaves them out.
    """
    said, true = claims_of(written), claims_of(truth)
    wrong = {
        "hand": said.hand not in (None, slots["hand"]),
        "place": said.place not in (None, slots["place"]),
        "colour": said.colour not in (None, true.colour),
        "things": bool(said.things - true.things),
    }
    return [name for name, is_false in wrong.items() if is_false]
