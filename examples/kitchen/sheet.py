"""A contact sheet of random pairs: the frame before, the frame during the action, and the label.

    python -m examples.kitchen.sheet --out docs/kitchen_pairs.jpg

draws 48 pairs of the test split. Everything random follows from `--seed`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LABEL = 4, 16  # pixels between cells and above the frames


@dataclass(kw_only=True)
class SheetConfig:
    """Draw a contact sheet of random pairs of the kitchen."""

    out: Path  # the image, .png or .jpg
    pairs: int = 48  # number of pairs
    columns: int = 6  # pairs in a row
    size: int = 128  # pixels along a side of the frames
    split: Literal["train", "val", "test"] = "test"
    seed: int = 0  # chooses the pairs

    def __post_init__(self):
        if min(self.pairs, self.columns) < 1 or not 16 <= self.size <= 1024:
            raise ValueError(
                f"`--pairs` and `--columns` must be at least 1 and `--size` 16 to 1024, "
                f"got {self.pairs}, {self.columns} and {self.size}."
            )
        if self.out.suffix.lower() not in (".png", ".jpg"):
            raise ValueError(f"`--out` must end in .png or .jpg, got {self.out}.")


def sheet(rows: list[dict], columns: int) -> Image.Image:
    """Contact sheet of manifest rows, `columns` pairs in a row."""
    size = rows[0]["image_0"].width
    width, height = 2 * size + 2 * GAP, size + LABEL + GAP
    image = Image.new("RGB", (columns * width + GAP, -(-len(rows) // columns) * height + GAP), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    for number, row in enumerate(rows):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        draw.text((x, y), row["action"], fill="black", font=font)
        image.paste(row["image_0"], (x, y + LABEL))
        image.paste(row["image_1"], (x + size + 1, y + LABEL))
    return image


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from tqdm import tqdm

    from lego_pipeline.config import parse_config

    config = parse_config(SheetConfig, arguments=arguments)
    try:
        from .render import render_rows

        indices = np.random.default_rng(config.seed).choice(100_000, config.pairs, replace=False)
        rows = []
        for index in tqdm(indices, desc="kitchen sheet", unit="pair"):
            rows += render_rows(config.split, range(index, index + 1), config.size)
        image = sheet(rows, config.columns)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        image.save(config.out, quality=92, subsampling=0)
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
