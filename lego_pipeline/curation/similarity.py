"""How alike the two frames of a pair are: an image encoder's cosine, or a classical measure with its own band.

The paper drops pairs whose CLIP similarity lies outside [0.81, 0.97] (Lai et al., ECCV 2024, supplement): below, the
view has changed; above, nothing has happened. That band belongs to CLIP's projected image embeddings. Another encoder
needs its own, and without an encoder `colour_similarity` stands in, with `COLOUR_BAND`.

`COLOUR_BAND` was calibrated on rendered frames. To be kept: 24 pairs of `examples.kitchen.clips` (frames at 0.5 and
1.58 s, 0.830 for a fridge that is shut to 0.9959 for a pan) and the 64 of `lego_pipeline.checkpoints`, whose head does
not move (0.845 to 0.9980). To be dropped: 72 pairs of frames of a clip before its action, when only the head sways
(0.9977 to 0.9998), and 224 of an input frame and the target frame of another kitchen. The band keeps all of the first
and 62 of the second, and drops all of the third and 56 % of the fourth, since kitchens share colours. It has not been
calibrated on photographs, and colours say nothing about layout: use an encoder where you have one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from lego_pipeline.data.shards import model_key
from lego_pipeline.loading import check_component

CLIP_BAND = (0.81, 0.97)
COLOUR_BAND = (0.78, 0.9975)
COLOUR_SIDE, LEVELS = 64, 8  # pixels that are counted along a side, nodes of the histogram along a channel
DIGITS = 4  # to which a similarity is rounded


@dataclass(frozen=True)
class Similarity:
    """A measure of two frames.

    Attributes:
        name: what it is, for reports and the manifest's `similarity_by`.
        band: lowest and highest value of a pair that is kept.
        measure: of two upright RGB frames, 1 for equal ones.
    """

    name: str
    band: tuple[float, float]
    measure: Callable[[PIL.Image.Image, PIL.Image.Image], float]

    def __call__(self, first: PIL.Image.Image, second: PIL.Image.Image) -> float:
        """The similarity of two frames, rounded to `DIGITS`."""
        return round(self.measure(first, second), DIGITS)


def load_similarity(
    encoder: Path | None = None, band: tuple[float, float] | None = None, device: torch.device | str = "cpu"
) -> Similarity:
    """The similarity by an encoder, or the classical one.

    Args:
        encoder: folder of a CLIP, SigLIP, DINOv2 or DINOv3 model and its image processor, as transformers saves
            them; None for `colour_similarity`.
        band: instead of the measure's own.
        device: of the encoder.

    Raises:
        FileNotFoundError: the folder has no model.
        ValueError: its weights are cut off, no band is known for this encoder, or the band is none.
    """
    if band is not None and not -1 <= band[0] < band[1] <= 1:
        raise ValueError(f"`band` must be two rising numbers from -1 to 1, got {band}.")
    if encoder is None:
        return Similarity("colour histograms", band or COLOUR_BAND, colour_similarity)
    if not (encoder / "config.json").is_file():
        raise FileNotFoundError(
            f"`encoder` must be a folder with a model and its image processor, found no config.json in {encoder}."
        )
    check_component(encoder)
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(encoder, local_files_only=True, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(device)
    processor = AutoImageProcessor.from_pretrained(encoder, local_files_only=True)
    kind = model.config.model_type
    if band is None and kind != "clip":
        raise ValueError(
            f"`band` must be given for an encoder of type {kind}: the paper's {list(CLIP_BAND)} holds for CLIP only. "
            "Look at the similarities of a few hundred pairs (without bounds: --band -1 1) and choose."
        )

    def cosine(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
        with _one_thread():
            embeds = _embed(model, processor([first, second], return_tensors="pt").to(device))
            return float(torch.nn.functional.cosine_similarity(embeds[0], embeds[1], dim=0))

    return Similarity(f"{kind} {model_key(model)[:8]}", band or CLIP_BAND, cosine)


@contextmanager
def _one_thread() -> Generator[None]:
    """Torch on one thread: sums of several round differently, and processes that share a machine have fewer each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _embed(model: Any, inputs: Any) -> torch.Tensor:
    """(B, D) embeddings: the projected ones where a model has text too, else those that it pools."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(**inputs).pooler_output.float()
    output = model(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state[:, 0] if pooled is None else pooled).float()


def colour_similarity(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
    """Bhattacharyya coefficient of two frames' colour histograms: 0 for no common colour, 1 for the same shares."""
    return float(np.sqrt(colour_histogram(first) * colour_histogram(second)).sum())


def colour_histogram(image: PIL.Image.Image) -> np.ndarray:
    """(LEVELS^3,) shares of RGB colours; each pixel is shared between the eight nearest nodes."""
    small = image.resize((COLOUR_SIDE, COLOUR_SIDE), PIL.Image.Resampling.BOX)
    values = np.asarray(small, np.float64).reshape(-1, 3) / 255 * (LEVELS - 1)
    lower = np.minimum(values.astype(int), LEVELS - 2)
    share = values - lower
    histogram = np.zeros(LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        weights = np.where(corner, share, 1 - share).prod(1)
        nodes = (lower + corner) @ [LEVELS * LEVELS, LEVELS, 1]
        histogram += np.bincount(nodes, weights, LEVELS**3)
    return histogram / len(values)
