"""Left and right exchanged: the mirrored frame, and the words and boxes that go with it.

A mirrored pair is a further training pair only if everything that tells the sides apart is mirrored with it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import PIL.Image
import PIL.ImageOps

_PAIRS = (("left", "right"), ("leftmost", "rightmost"), ("leftward", "rightward"), ("leftwards", "rightwards"))
_PAIRS += tuple(("clockwise", f"{against}clockwise") for against in ("counter", "counter-", "anti", "anti-"))
_OTHER = {second: first for first, second in _PAIRS} | {first: second for first, second in reversed(_PAIRS)}
# Longest first, so that "counter-clockwise" is not taken for the "clockwise" in it.
_WORDS = re.compile(rf"\b({'|'.join(sorted(_OTHER, key=len, reverse=True))})\b", re.IGNORECASE)


def mirror_text(text: str) -> str:
    """The text with "left" and "right" exchanged, and their relatives ("leftmost", "clockwise") too.

    Whole words only ("left-handed", but not "leftover"), upper and lower case kept. The words are exchanged whatever
    they mean: "the right lid" and "what is left" come out wrong, so leave mirrored frames out where such are common.
    """
    return _WORDS.sub(lambda match: _in_case_of(match[0], _OTHER[match[0].lower()]), text)


def mirror_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """The frame as in a mirror, left and right exchanged."""
    return PIL.ImageOps.mirror(image)


def mirror_boxes(boxes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Boxes of a manifest (fractions of the frame) as they lie in the mirrored frame, the sides in their names too."""
    return [{**box, "name": mirror_text(box["name"]), "x0": 1.0 - box["x1"], "x1": 1.0 - box["x0"]} for box in boxes]


def _in_case_of(model: str, word: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
