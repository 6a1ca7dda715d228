"""Contact sheets: cards of frames side by side with a title above and wrapped text below, on one picture.

`lego demo` draws its result with this, and so can a training script or a model card. Only Pillow is needed; the font
is Pillow's own, so that the sheet looks the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, CARD, RULE = "#f4f4f1", "#ffffff", "#deded8"
INK, SOFT = "#1d1d1b", "#6d6d67"
MARGIN, PADDING, GAP, RADIUS = 24, 16, 8, 10  # pixels


@dataclass(frozen=True, kw_only=True)
class Card:
    """One case of a sheet.

    Attributes:
        title: what was asked, one line.
        frames: (caption, picture) pairs from left to right; every picture is scaled to fit a square.
        text: what is said about it, wrapped below the frames.
    """

    title: str
    frames: Sequence[tuple[str, Image.Image]]
    text: str = ""


def draw_contact_sheet(
    cards: Sequence[Card], *, title: str = "", footer: str = "", columns: int = 2, frame_size: int = 192
) -> Image.Image:
    """Draw cards row by row on one sheet.

    Args:
        cards: at least one; all columns are as wide as the card with the most frames.
        title: large line above the cards.
        footer: small wrapped text below them.
        columns: cards side by side.
        frame_size: side in pixels of the square that each frame is fitted into.

    Returns:
        An RGB image.

    Raises:
        ValueError: no cards, a card without frames, or fewer than one column.
    """
    if not cards or not all(card.frames for card in cards):
        raise ValueError("`cards` must hold at least one card, each with at least one frame.")
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1, got {columns}.")
    columns = min(columns, len(cards))
    most = max(len(card.frames) for card in cards)
    inner = most * frame_size + (most - 1) * GAP
    card_width = inner + 2 * PADDING
    width = columns * card_width + (columns - 1) * MARGIN + 2 * MARGIN

    title_font, card_font, text_font, small_font = (_font(frame_size * size) for size in (0.15, 0.105, 0.083, 0.07))
    texts = [_wrap(card.text, text_font, inner) for card in cards]
    footer_lines = _wrap(footer, small_font, width - 2 * MARGIN)
    head = PADDING + _line_height(card_font) + GAP
    below = GAP + _line_height(small_font)
    rows = [range(start, min(start + columns, len(cards))) for start in range(0, len(cards), columns)]
    # Cards of a row are equally high: the longest text decides.
    heights = [
        head + frame_size + below + PADDING + max(len(texts[i]) for i in row) * _line_height(text_font) for row in rows
    ]
    top = MARGIN + (_line_height(title_font) + PADDING if title else 0)
    bottom = len(footer_lines) * _line_height(small_font) + (PADDING if footer_lines else 0)
    height = top + sum(heights) + MARGIN * (len(rows) - 1) + bottom + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, title_font)
    y = top
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = MARGIN + column * (card_width + MARGIN)
            draw.rounded_rectangle((x, y, x + card_width, y + row_height), RADIUS, CARD, RULE)
            draw.text((x + PADDING, y + PADDING), cards[i].title, INK, card_font)
            for number, (caption, frame) in enumerate(cards[i].frames):
                left = x + PADDING + number * (frame_size + GAP)
                picture = _fit(frame, frame_size)
                sheet.paste(picture, (left, y + head + (frame_size - picture.height) // 2))
                draw.text((left, y + head + frame_size + GAP // 2), caption, SOFT, small_font)
            line_y = y + head + frame_size + below
            for line in texts[i]:
                draw.text((x + PADDING, line_y), line, INK, text_font)
                line_y += _line_height(text_font)
        y += row_height + MARGIN
    y += PADDING - MARGIN
    for line in footer_lines:
        draw.text((MARGIN, y), line, SOFT, small_font)
        y += _line_height(small_font)
    return sheet


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; without FreeType it is a bitmap of one size."""
    return ImageFont.load_default(size=max(10, round(size)))


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(1.35 * (font.getbbox("Ag")[3] - min(0, font.getbbox("Ag")[1])))


def _fit(picture: Image.Image, size: int) -> Image.Image:
    """The picture scaled so that its longer side is `size`."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a single word that is wider is cut."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines
