"""VLM families by the `model_type` of their transformers config; a new family is one module and one line here."""

from typing import Any

from lego_pipeline.vlm import llava, qwen3_vl
from lego_pipeline.vlm.base import Enhancement, VlmFamily, base_model

__all__ = ["VLM_FAMILIES", "Enhancement", "VlmFamily", "family_of"]

VLM_FAMILIES: dict[str, VlmFamily] = {"llava": llava, "qwen3_vl": qwen3_vl}


def family_of(vlm: Any) -> VlmFamily:
    """Module with the functions of `VlmFamily` for a loaded VLM, wrapped by peft or not.

    Raises:
        ValueError: its `model_type` is not a known family.
    """
    model_type = base_model(vlm).config.model_type
    if model_type not in VLM_FAMILIES:
        raise ValueError(
            f"`vlm` must be of a known family ({', '.join(VLM_FAMILIES)}), got model type {model_type!r}; "
            "add a module under `lego_pipeline/vlm/` and a line in `VLM_FAMILIES`."
        )
    return VLM_FAMILIES[model_type]
