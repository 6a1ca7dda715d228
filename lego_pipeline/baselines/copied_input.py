"""The floor of every table: the input frame itself, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lego_pipeline.baselines.base import Baseline

if TYPE_CHECKING:
    import PIL.Image
    import torch


@dataclass(kw_only=True)
class CopiedInput(Baseline):
    """Copies the frame.

    The paper's pairs are kept only where input and target are alike, so a copy scores high wherever a metric compares
    whole pictures; a system that does no better has drawn nothing.
    """

    def load(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing is loaded."""

    def draw(
        self, frames: Sequence[PIL.Image.Image], texts: Sequence[str], generators: Sequence[torch.Generator]
    ) -> list[PIL.Image.Image]:
        return list(frames)
