"""The measure and the curve of a storyboard's drift."""

import re
from xml.etree import ElementTree

import PIL.Image
import pytest

from lego_pipeline.app.drift import difference, draw_drift

DRIFT = [{"first": 4.0, "source": 4.0}, {"first": 8.0, "source": 2.0}]


def test_the_difference_is_the_root_mean_square_in_per_cent() -> None:
    black, grey = (PIL.Image.new("RGB", (2, 1), (value, value, value)) for value in (0, 51))
    half = black.copy()
    half.putpixel((0, 0), (255, 255, 255))
    assert difference(black, black) == 0
    assert difference(black, grey) == pytest.approx(20)
    assert difference(half, black) == pytest.approx(100 / 2**0.5)


def lines_of(drift: list[dict[str, float]], titles: list[str], follow: str) -> list[list[tuple[float, float]]]:
    figure = ElementTree.fromstring(draw_drift(drift, titles, follow))
    paths = [line.attrib["points"].split() for line in figure.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in path)] for path in paths]


def test_a_chain_has_two_lines_that_climb_and_fall_as_the_numbers_do() -> None:
    first, source = lines_of(DRIFT, ["1. open", "2. take"], "previous")
    assert first[0] == source[0]
    assert first[1][1] < first[0][1] < source[1][1]  # y goes down
    assert first[1][0] == source[1][0] > first[0][0]


def test_from_the_first_frame_there_is_one_line() -> None:
    assert len(lines_of(DRIFT, ["1. open", "2. take"], "first")) == 1


def test_words_of_a_visitor_stay_words() -> None:
    shown = draw_drift(DRIFT, ["<script>alert('1')</script>", '2. "take" & go'], "previous")
    assert "<script" not in shown
    assert "&quot;take&quot; &amp; go 8.0 %" in shown
    ElementTree.fromstring(shown)


def test_the_figure_asks_for_nothing_from_outside() -> None:
    assert not re.search(r"https?:|url\(|href|src=", draw_drift(DRIFT, ["1. open", "2. take"], "previous"))
