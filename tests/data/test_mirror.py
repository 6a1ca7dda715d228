"""Left and right exchanged in words, frames and boxes."""

import PIL.Image
import pytest

from lego_pipeline.data.mirror import mirror_boxes, mirror_image, mirror_text


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("My left hand takes the cup from the right.", "My right hand takes the cup from the left."),
        ("Left, LEFT, left", "Right, RIGHT, right"),
        ("the left-handed grip of the leftmost cup", "the right-handed grip of the rightmost cup"),
        ("I turn it clockwise, then Counter-clockwise.", "I turn it counterclockwise, then Clockwise."),
        ("Anti-clockwise or anticlockwise", "Clockwise or clockwise"),
        ("leftovers in bright copyright", "leftovers in bright copyright"),
        ("I open the drawer.", "I open the drawer."),
    ],
)
def test_words_for_sides_are_exchanged(text: str, mirrored: str) -> None:
    assert mirror_text(text) == mirrored


def test_twice_mirrored_is_as_before() -> None:
    text = "Right hand, leftwards, the rightmost LEFT one, turned counterclockwise and clockwise."
    assert mirror_text(mirror_text(text)) == text


def test_the_frame_and_its_boxes_are_mirrored_alike() -> None:
    frame = PIL.Image.new("RGB", (8, 4))
    frame.paste((255, 0, 0), (0, 1, 2, 3))
    [box] = mirror_boxes([{"name": "left hand", "x0": 0.0, "y0": 0.25, "x1": 0.25, "y1": 0.75}])
    assert box == {"name": "right hand", "x0": 0.75, "y0": 0.25, "x1": 1.0, "y1": 0.75}
    red = [(x, y) for x in range(8) for y in range(4) if mirror_image(frame).getpixel((x, y)) == (255, 0, 0)]
    assert red == [(6, 1), (6, 2), (7, 1), (7, 2)]
