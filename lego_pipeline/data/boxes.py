"""Boxes of hands and active objects as masks: the one rule by which edges between pixels are rounded."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def box_mask(boxes: Iterable[Mapping[str, Any]], height: int, width: int) -> torch.Tensor:
    """Cells of a grid that any of the boxes touches: edges are rounded outward.

    Args:
        boxes: with `x0`, `y0`, `x1`, `y1` as fractions of the frame's width and height, as in a manifest.
        height, width: of the grid, in pixels or latent cells.

    Returns:
        (height, width) bool.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        rows = slice(int(box["y0"] * height), math.ceil(box["y1"] * height))
        columns = slice(int(box["x0"] * width), math.ceil(box["x1"] * width))
        mask[rows, columns] = True
    return mask
