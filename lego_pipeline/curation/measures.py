"""What is measured of a frame before it may enter a pair: sharpness, darkness, sameness.

All on grey values in 0 to 255 at a height of at most `HEIGHT` pixels, so that a video's resolution counts little.

Sharpness is the variance of the 3 x 3 Laplacian (Pech-Pacheco et al., ICPR 2000) divided by the variance of the grey
values themselves, which takes out contrast and exposure. Among the frames of one moment the sharpest is taken; the
floor below which a moment is dropped is low and absolute. On the 64 pairs of `lego_pipeline.checkpoints` sharp frames
measure 0.17 to 1.4, and 0.018 at most once a Gaussian of 2 pixels (of 128) has blurred them; the default floor of 0.03
lies between.
"""

from __future__ import annotations

import numpy as np
import PIL.Image

HEIGHT = 256  # pixels


def grey(image: PIL.Image.Image, height: int = HEIGHT) -> np.ndarray:
    """(h, w) float32 grey values (ITU-R 601) in 0 to 255 with h at most `height`, averaged over areas."""
    image = image.convert("L")
    if image.height > height:
        size = (max(1, round(image.width * height / image.height)), height)
        image = image.resize(size, PIL.Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def sharpness(values: np.ndarray) -> float:
    """Variance of the Laplacian over that of the grey values (h, w); 0 for a flat frame."""
    if min(values.shape) < 3:
        return 0.0
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    spread = float(values.var(dtype=np.float64))
    return float(laplacian.var(dtype=np.float64)) / spread if spread > 0 else 0.0


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two frames' grey values; infinite if their sizes differ."""
    return float(np.abs(first - second).mean(dtype=np.float64)) if first.shape == second.shape else float("inf")
