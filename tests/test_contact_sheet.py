"""Contact sheets hold every frame and grow with their text."""

import pytest
from PIL import Image

from lego_pipeline.contact_sheet import Card, draw_contact_sheet

RED, BLUE = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))


def card(text: str = "", **changes: object) -> Card:
    return Card(**{"title": "open drawer", "frames": [("input", RED), ("generated", BLUE)], "text": text, **changes})


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(number for number, found in sheet.getcolors(sheet.width * sheet.height) if found == colour)


def test_every_frame_is_drawn_at_the_asked_size() -> None:
    sheet = draw_contact_sheet([card()] * 3, frame_size=64)
    assert count(sheet, (255, 0, 0)) == count(sheet, (0, 0, 255)) == 3 * 64 * 64


def test_a_wide_frame_keeps_its_aspect() -> None:
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    assert count(draw_contact_sheet([card(frames=[("input", wide)])], frame_size=64), (255, 0, 0)) == 64 * 32


def test_long_text_is_wrapped_and_makes_the_sheet_higher_not_wider() -> None:
    short, long = draw_contact_sheet([card("word")]), draw_contact_sheet([card("word " * 60)])
    assert long.width == short.width
    assert long.height > short.height


def test_a_word_wider_than_the_card_is_cut() -> None:
    assert (
        draw_contact_sheet([card("w" * 400)], frame_size=64).height
        > draw_contact_sheet([card("w")], frame_size=64).height
    )


def test_columns_put_cards_side_by_side() -> None:
    one, two = (draw_contact_sheet([card()] * 2, columns=columns) for columns in (1, 2))
    assert two.width > one.width
    assert two.height < one.height


def test_the_same_cards_give_the_same_sheet() -> None:
    assert draw_contact_sheet([card("text")]).tobytes() == draw_contact_sheet([card("text")]).tobytes()


@pytest.mark.parametrize("cards", [[], [card(frames=[])]])
def test_a_sheet_without_frames_is_refused(cards: list[Card]) -> None:
    with pytest.raises(ValueError, match="`cards`"):
        draw_contact_sheet(cards)


def test_less_than_one_column_is_refused() -> None:
    with pytest.raises(ValueError, match="`columns` must be at least 1, got 0"):
        draw_contact_sheet([card()], columns=0)
