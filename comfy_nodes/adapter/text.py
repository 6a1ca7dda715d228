"""A transformers CLIP text tower as ComfyUI's CLIP, with a vocabulary of its own.

Letters: B texts, C width.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.model_management as management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch

from .model import unfit

logger = logging.getLogger(__name__)


class SmallTextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with the vocabulary of its config; the stock class always has 49408 entries."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: torch.device, operations: Any):
        super().__init__(config_dict, dtype, device, operations)
        size = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


def native_clip(text_encoder: Any, tokenizer: Any, folder: Path, is_float32: bool = False) -> Any:
    """A transformers CLIP text tower as ComfyUI's CLIP, with the folder's own tokenizer.

    Args:
        text_encoder: `CLIPTextModel`, weights are copied.
        tokenizer: `CLIPTokenizer` of the folder.
        folder: of the tokenizer's files.
        is_float32: whether weights are float32; otherwise ComfyUI's choice on a GPU, and float32 on a CPU, which
            gains nothing by less.

    Raises:
        ValueError: a weight is missing or left over, or the length isn't CLIP's.
    """
    config = text_encoder.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "max_position_embeddings", "eos_token_id", "vocab_size")  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    if config.layer_norm_eps != 1e-5:
        raise ValueError(unfit("text_encoder.layer_norm_eps", 1e-5, config.layer_norm_eps))
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}

    class LegoClipModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None):
            super().__init__(
                device=device,
                max_length=length,
                dtype=dtype,
                textmodel_json_config=dict(settings),
                special_tokens=special,
                return_projected_pooled=False,
                model_class=SmallTextModel,
                model_options=model_options or {},
            )

    class LegoTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None):
            super().__init__(
                tokenizer_path=str(folder),
                max_length=length,
                embedding_directory=embedding_directory,
                embedding_size=settings["hidden_size"],
                pad_token=special["pad"],
                tokenizer_data=tokenizer_data or {},
            )

    weights = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in text_encoder.state_dict().items()
        if not key.endswith("position_ids")
    }
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=LegoTokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=LegoClipModel),
    )
    device = management.text_encoder_device()
    options = {"dtype": torch.float32} if is_float32 or device.type == "cpu" else {}
    count = sum(weight.numel() for weight in weights.values())
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=count,
        state_dict=[weights],
        model_options=options,
    )
    # The text projection belongs to CLIP's other half; LEGO reads the states before it.
    expected = clip.cond_stage_model.clip_l.transformer.state_dict().keys() - {"text_projection.weight"}
    if expected != weights.keys():
        different = sorted(expected ^ weights.keys())
        raise ValueError(unfit("text_encoder", "a CLIP text model", f"{len(different)} other weights, {different[0]}"))
    return clip


def encode_text(clip: Any, texts: Sequence[str]) -> torch.Tensor:
    """Last hidden state of CLIP for texts as they are: no weights in parentheses, no embeddings, cut to its length.

    `LegoPipeline.encode_prompt` reads texts so; ComfyUI's own text nodes read `(word:1.2)` as a weight and give a
    long text several lengths.

    Args:
        clip: from `native_clip`, or another single CLIP.
        texts: B texts.

    Returns:
        (B, 77, C) float32.

    Raises:
        ValueError: the text encoder is no single CLIP.
    """
    name = getattr(clip.tokenizer, "clip", None)
    inner = getattr(clip.tokenizer, name, None) if isinstance(name, str) else None
    if not isinstance(inner, comfy.sd1_clip.SDTokenizer):
        raise ValueError(
            f"`clip` must be one CLIP text encoder, got {type(clip.tokenizer).__name__}; connect LEGO Load Pipeline."
        )
    states = []
    for text in texts:
        ids = inner.tokenizer(text, truncation=True, max_length=inner.max_length).input_ids
        if len(ids) == inner.max_length:
            logger.warning("The text encoder reads %d tokens; what follows them is cut off: %s", len(ids), text)
        ids += [inner.pad_token] * (inner.max_length - len(ids))
        tokens = {clip.tokenizer.clip_name: [[(token, 1.0) for token in ids]]}
        states.append(clip.encode_from_tokens(tokens).float())
    return torch.cat(states)
