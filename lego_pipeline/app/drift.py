"""How far a storyboard moves away from its first frame.

An action changes a frame anyhow: hands come in. If nothing else happened, every picture would be about as far from the
first frame as the first picture is; a curve that climbs shows that errors add up when each picture feeds the next.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image

GRID = "#80808040"
LINES = {
    "first": ("#ea580c", "", "first frame"),
    "source": ("#2563eb", 'stroke-dasharray="5 4"', "frame before"),
}
CAPTION = (
    "Drift: root mean square difference of the pixels from the first frame and from the frame before. Hands count as "
    "change; a solid line that climbs shows that errors add up."
)


def difference(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
    """Root mean square difference of the pixels of two pictures of one size, in per cent of the range."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in (first, second)]
    return float(np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2)) / 255 * 100)


def draw_drift(drift: Sequence[Mapping[str, float]], titles: Sequence[str], follow: str) -> str:
    """The curve as an HTML figure with an SVG in it, in the colours of the page around it.

    Args:
        drift: of `Run`, one entry for each picture.
        titles: of the pictures.
        follow: of `lego_pipeline.storyboard`; where all start from the first frame there is one line only.

    Returns:
        HTML without scripts and without a reference to anything outside.
    """
    width, height, left, right, top, bottom = 720, 240, 44, 150, 14, 30
    most = max(5, 5 * math.ceil(max(max(entry.values()) for entry in drift) / 5))

    def x(k: int) -> float:
        return left + (width - left - right) * (k + 0.5) / len(drift)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / most

    parts = []
    for value in (0, most / 2, most):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{GRID}"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g} %</text>')
    for k, title in enumerate(titles):
        short = title if len(title) <= (room := 84 // len(titles)) else f"{title[: max(1, room - 1)]}…"
        parts.append(f'<text x="{x(k):.1f}" y="{height - 8}" text-anchor="middle">{html.escape(short)}</text>')
    for kind, (colour, dash, name) in LINES.items():
        if kind == "source" and follow == "first":
            continue
        points = [(x(k), y(entry[kind])) for k, entry in enumerate(drift)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points]
        row = top + 14 + 22 * list(LINES).index(kind)
        parts.append(f'<line x1="{width - right + 8}" x2="{width - right + 28}" y1="{row - 4}" y2="{row - 4}" '
                     f'stroke="{colour}" stroke-width="2" {dash}/>')  # fmt: skip
        parts.append(f'<text x="{width - right + 34}" y="{row}">{name}</text>')
    values = "; ".join(f"{title} {entry['first']:.1f} %" for title, entry in zip(titles, drift, strict=True))
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" width="100%" font-size="12" fill="currentColor" '
        f'aria-label="Difference from the first frame: {html.escape(values)}">{"".join(parts)}</svg>'
        f"<figcaption>{CAPTION}</figcaption></figure>"
    )
