"""What a visual LLM hands to the diffusion model, and the functions that a VLM family provides.

Letters: N_i VLM image tokens, T VLM text states, D VLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save_file

# What the paper's VLM was tuned on, `{}` for the action.
DEFAULT_QUESTION = "How does the person properly {} that is displayed in the video frame?"


def check_question(template: str) -> None:
    """The rule for every `question_template`.

    Raises:
        ValueError: it doesn't have exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(
            f"`question_template` must have exactly one {{}}, where the action goes, got {template!r}; write it there."
        )


def ask(template: str, action: str) -> str:
    """The question about an action, e.g. "open drawer." as "How does the person properly open drawer ...?".

    Spaces and full stops around the action are dropped, the same in tuning, in caching and in the pipeline.
    """
    return template.replace("{}", action.strip(" ."))


@dataclass
class Enhancement:
    """An enriched description and the VLM's embeddings that go with it (paper section 3.2).

    Attributes:
        description: R, the detailed description of how the action is carried out in the frame.
        image_embeds: (N_i, D) float, F_img, the multimodal projector's output for the frame.
        text_embeds: (T, D) float, F_txt, the last-layer states that predict each answer token, end token included.
        vlm_id: of the VLM that made it (`lego_pipeline.enhance.vlm_id`), or None if unknown; a checkpoint that was
            trained with another VLM refuses it.
    """

    description: str
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    vlm_id: str | None = None

    def to(self, *args: Any, **kwargs: Any) -> "Enhancement":
        """Same enhancement with both tensors moved as by `torch.Tensor.to`."""
        moved = self.image_embeds.to(*args, **kwargs), self.text_embeds.to(*args, **kwargs)
        return replace(self, image_embeds=moved[0], text_embeds=moved[1])

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, description and the VLM's id in its metadata."""
        tensors = {"image_embeds": self.image_embeds, "text_embeds": self.text_embeds}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        known = {} if self.vlm_id is None else {"vlm_id": self.vlm_id}
        save_file(tensors, path, metadata={"description": self.description, **known})

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
            tensors = file.get_tensor("image_embeds"), file.get_tensor("text_embeds")
            return cls(metadata["description"], *tensors, metadata.get("vlm_id"))


def wake(model: torch.nn.Module) -> torch.device:
    """Device on which a model computes, with its weights brought there if it is offloaded as a whole.

    Offloading waits for a model to be called, while transformers' `generate` calls a VLM's vision tower before the
    VLM itself. Weights that are offloaded layer by layer stay where they are: each layer waits for its own call.
    """
    device = None
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)  # of accelerate: model and sequential offload
        registry = getattr(module, "_diffusers_hook", None)
        group_hook = None if registry is None else registry.get_hook("group_offloading")
        if device is None and getattr(hook, "execution_device", None) is not None:
            device = torch.device(hook.execution_device)
        if device is None and group_hook is not None:
            device = torch.device(group_hook.config.onload_device)
        if module is model:
            for own in (hook, group_hook):
                if own is not None:
                    own.pre_forward(model)
    return next(model.parameters()).device if device is None else device


def base_model(vlm: Any) -> Any:
    """The transformers model inside a peft wrapper (its adapter stays active), or the model itself."""
    return vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm


def active_module(module: torch.nn.Module) -> torch.nn.Module:
    """The trained copy of a module that peft keeps beside the original (`modules_to_save`), or the module itself."""
    copies, names = getattr(module, "modules_to_save", None), getattr(module, "active_adapters", [])
    return copies[names[0]] if copies is not None and names else module


class VlmFamily(Protocol):
    """The functions of a family module, e.g. `lego_pipeline.vlm.llava`.

    A frame passes two stages. `frame_states` is all that the language model needs of it, before the connector, the
    VLM's projector, where a family has one that can be told apart: (N_i, K). With it given to `generate` and `embed`
    no vision module is called. `image_embeds` makes F_img (N_i, D) of it by the connector alone, which is rebuilt
    without the VLM by `build_connector(connector_settings(vlm))` and its state dict.
    """

    @property
    def LORA_TARGETS(self) -> str:
        """Regular expression that matches the names of the language model's linear layers in full."""
        ...

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
        frame_states: Sequence[torch.Tensor] | None = None,
    ) -> list[str]: ...

    def embed(
        self,
        vlm: Any,
        processor: Any,
        images: Sequence[PIL.Image.Image],
        questions: Sequence[str],
        descriptions: Sequence[str],
        frame_states: Sequence[torch.Tensor] | None = None,
    ) -> list[Enhancement]: ...

    def frame_states(self, vlm: Any, processor: Any, images: Sequence[PIL.Image.Image]) -> list[torch.Tensor]: ...

    def connector(self, vlm: Any) -> torch.nn.Module: ...

    def connector_settings(self, vlm: Any) -> dict[str, Any]: ...

    def build_connector(self, settings: dict[str, Any]) -> torch.nn.Module: ...

    def image_embeds(self, connector: torch.nn.Module, states: torch.Tensor, dim: int) -> torch.Tensor: ...

    def sizes(self, vlm: Any, processor: Any) -> tuple[int, int]: ...

    def training_batch(
        self,
        processor: Any,
        images: Sequence[PIL.Image.Image],
        questions: Sequence[str],
        descriptions: Sequence[str],
    ) -> dict[str, torch.Tensor]: ...

    def vision_modules(self, vlm: Any) -> list[torch.nn.Module]: ...

    def language_modules(self, vlm: Any) -> list[torch.nn.Module]: ...

    def connector_names(self, vlm: Any) -> list[str]: ...
