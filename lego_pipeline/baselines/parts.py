"""LEGO with parts of its condition left out: the label-only twin, and the rows of the paper's ablation.

What is left out is zero, as in training with that part left out (`train/train_ldm.py --vlm-parts`). A checkpoint that
was trained with all parts and draws with some is an ablation at inference; one that was trained with these alone is
what the paper's table has.

Letters: B samples, L condition tokens, C cross-attention width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lego_pipeline import LegoPipeline
    from lego_pipeline.vlm import Enhancement

LABEL = "label"  # the bare label through the text tower, no VLM
PARTS = (
    LABEL,
    "description",  # the description through the text tower, no VLM embeddings
    "description+image",  # and the projected embeddings of the frame
    "description+text",  # and the projected text states
    "description+image+text",  # all, LEGO
)


def condition_of_parts(
    pipeline: LegoPipeline,
    parts: str,
    frames: Sequence[Any],
    actions: Sequence[str] | None,
    descriptions: Sequence[str] | None = None,
    generators: list[torch.Generator] | None = None,
    cache: Any = None,
    check_vlm: bool = True,
) -> tuple[torch.Tensor, list[str]]:
    """The condition with some parts, to be passed to a call as `prompt_embeds`.

    Args:
        pipeline: with its VLM, or a cache that has all; for "label" neither is needed.
        parts: one of `PARTS`.
        frames, actions, descriptions, generators, cache: as `LegoPipeline.enhance`, B of each. For "label" the
            description is read only where there is no action.
        check_vlm: whether the embeddings have to be of the VLM that the checkpoint was trained with.

    Returns:
        Condition (B, L, C), and the B texts that went through the text tower.

    Raises:
        ValueError: unknown parts, no VLM where one is needed, or another VLM than the checkpoint's.
    """
    from lego_pipeline.checks import check_enhancements

    if parts not in PARTS:
        raise ValueError(f"`parts` must be one of {', '.join(PARTS)}, got {parts!r}.")
    if parts == LABEL:
        texts = list(actions or descriptions or ())
        return pipeline.encode_condition(description=texts)[0], texts
    enhancements = pipeline.enhance(list(frames), actions, descriptions, generators, cache)
    if check_vlm:
        check_enhancements(enhancements, pipeline.projector.config)
    return condition_of_enhancements(pipeline, parts, enhancements)


def condition_of_enhancements(
    pipeline: LegoPipeline, parts: str, enhancements: Sequence[Enhancement]
) -> tuple[torch.Tensor, list[str]]:
    """As `condition_of_parts`, from what the VLM made before; `parts` is one of `PARTS` but "label"."""
    import torch

    texts = [item.description for item in enhancements]
    projector, device = pipeline.projector, pipeline._execution_device
    kept = [item.to(device, projector.dtype) for item in enhancements]
    condition = projector(
        pipeline.encode_prompt(texts).to(projector.dtype),
        torch.stack([item.image_embeds for item in kept]) if "image" in parts else None,
        [item.text_embeds for item in kept] if parts.endswith("text") else None,
    )
    return condition, texts
