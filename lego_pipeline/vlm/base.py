"""What a visual LLM hands to the diffusion model, and the functions that a VLM family provides.

Letters: N_i VLM image tokens, T VLM text states, D VLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass
class Enhancement:
    """An enriched description and the VLM's embeddings that go with it (paper section 3.2).

    Attributes:
        description: R, the detailed description of how the action is carried out in the frame.
        image_embeds: (N_i, D) float, F_img, the multimodal projector's output for the frame.
        text_embeds: (T, D) float, F_txt, the last-layer states that predict each answer token, end token included.
    """

    description: str
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> "Enhancement":
        """Same enhancement with both tensors moved as by `torch.Tensor.to`."""
        return Enhancement(self.description, self.image_embeds.to(*args, **kwargs), self.text_embeds.to(*args, **kwargs))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, the description in its metadata."""
        tensors = {"image_embeds": self.image_embeds, "text_embeds": self.text_embeds}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"description": self.description})

    @classmethod
    def load(cls, path: str | Path) -> "Enhancement":
        """Reads a file written by `save`.

        Raises:
            ValueError: the file holds no enhancement.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "description" not in metadata or set(file.keys()) != {"image_embeds", "text_embeds"}:
                raise ValueError(
                    f"`{path}` must hold `image_embeds`, `text_embeds` and a description, got {sorted(file.keys())}; "
                    "make one with `lego enhance --output`."
                )
            return cls(metadata["description"], file.get_tensor("image_embeds"), file.get_tensor("text_embeds"))


class VlmFamily(Protocol):
    """The functions of a family module, e.g. `lego_pipeline.vlm.llava`."""

    def generate(
        self,
        vlm: Any,
        processor: Any,
        images: Sequence[PIL.Image.Image],
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        generators: Sequence[torch.Generator | None] | None,
    ) -> list[str]: ...

    def embed(
        self,
        vlm: Any,
        processor: Any,
        images: Sequence[PIL.Image.Image],
        questions: Sequence[str],
        descriptions: Sequence[str],
    ) -> list[Enhancement]: ...

    def training_batch(
        self,
        processor: Any,
        images: Sequence[PIL.Image.Image],
        questions: Sequence[str],
        descriptions: Sequence[str],
    ) -> dict[str, torch.Tensor]: ...

    def language_modules(self, vlm: Any) -> list[torch.nn.Module]: ...
