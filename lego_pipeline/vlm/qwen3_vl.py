"""Qwen3-VL through `Qwen3VLForConditionalGeneration`: describe an action in a frame, and embed frame and description.

The conversation, its text states and sampling are those of `lego_pipeline.vlm.chat`; all keys of the processor are
passed on, positions are left to the model (M-RoPE: those of an answer don't follow from its length). Its processor
needs torchvision (extra `vision`).

Qwen3-VL takes any size and gives as many tokens as the frame has 32-pixel squares, while the projector wants one
number. So every frame is brought to one square working size first: the whole field of view stays in, the aspect is
squeezed. The image processor's `size` (least and most pixels) bounds it; 512 x 512, 256 tokens, is wished for.

The vision side feeds the language model twice: the merger's output stands in for the image tokens, and as many
further outputs as there are deep-stack layers are added to the states after the first layers. Before the mergers the
states of a token would be wider than after them, so a frame's states are the merged ones, joined: (N_i, (1 + S) D),
the first D of which are F_img, and there is no connector to apply.

Letters: B batch, N_i image tokens, T answer tokens, D hidden width, S deep-stack layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from lego_pipeline.vlm import chat
from lego_pipeline.vlm.base import Enhancement, base_model, wake
from lego_pipeline.vlm.chat import answer_ids

LORA_TARGETS = chat.LANGUAGE_LINEARS
WORKING_PIXELS = 512 * 512


def working_size(processor: Any) -> int:
    """Sides in pixels to which every frame is brought: a multiple of what one token covers."""
    images = processor.image_processor
    least, most = images.size["shortest_edge"], images.size["longest_edge"]  # these are pixel counts
    token = images.patch_size * images.merge_size
    side = math.isqrt(min(max(WORKING_PIXELS, least), most))
    return max(side // token, 1) * token


def prompt_inputs(
    processor: Any, images: Sequence[PIL.Image.Image], questions: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """Processor output of each sample alone, frames at the working size.

    `input_ids` and `mm_token_type_ids` are (1, P), `pixel_values` (patches, values), `image_grid_thw` (1, 3).
    """
    side = working_size(processor)
    frames = [image.convert("RGB").resize((side, side), PIL.Image.Resampling.BICUBIC) for image in images]
    return chat.prompt_inputs(processor, frames, questions)


def generate(
    vlm: Any,
    processor: Any,
    images: Sequence[PIL.Image.Image],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.2,
    top_k: int = 50,
    generators: Sequence[torch.Generator | None] | None = None,
    frame_states: Sequence[torch.Tensor] | None = None,
) -> list[str]:
    """Descriptions of how the asked actions are carried out in the frames; see `llava.generate`."""
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    with torch.no_grad():
        frames = _states(vlm, inputs, frame_states, device)
    return chat.generate(
        vlm,
        processor,
        inputs,
        _image_outputs(frames, base_model(vlm).config.text_config.hidden_size),
        device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generators=generators,
    )


def embed(
    vlm: Any,
    processor: Any,
    images: Sequence[PIL.Image.Image],
    questions: Sequence[str],
    descriptions: Sequence[str],
    frame_states: Sequence[torch.Tensor] | None = None,
) -> list[Enhancement]:
    """Embeddings of frames and descriptions by one teacher-forced forward; see `llava.embed`."""
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    answers = [answer_ids(processor, description) for description in descriptions]
    frames, dim = _states(vlm, inputs, frame_states, device), base_model(vlm).config.text_config.hidden_size
    states = chat.text_states(vlm, processor, inputs, answers, _image_outputs(frames, dim), device)
    return [
        Enhancement(description, frame[:, :dim], rows)
        for description, frame, rows in zip(descriptions, frames, states, strict=True)
    ]


@torch.no_grad()
def frame_states(vlm: Any, processor: Any, images: Sequence[PIL.Image.Image]) -> list[torch.Tensor]:
    """Outputs of the merger and of the deep-stack mergers, joined.

    Returns:
        B tensors (N_i, (1 + S) D) on the VLM's device.
    """
    return _states(vlm, prompt_inputs(processor, images, [""] * len(images)), None, wake(vlm))


def connector(vlm: Any) -> torch.nn.Module:
    """Nothing: `frame_states` are merged already."""
    return torch.nn.Identity()


def connector_settings(vlm: Any) -> dict[str, Any]:
    """What `build_connector` needs: nothing."""
    return {}


def build_connector(settings: dict[str, Any]) -> torch.nn.Module:
    """As `connector`."""
    return torch.nn.Identity()


def image_embeds(connector: torch.nn.Module, states: torch.Tensor, dim: int) -> torch.Tensor:
    """F_img (..., N_i, D) of frame states (..., N_i, (1 + S) D): the merger's part."""
    return states[..., :dim]


def sizes(vlm: Any, processor: Any) -> tuple[int, int]:
    """(N_i, D): image tokens of a frame and hidden width of the language model."""
    vlm, frame = base_model(vlm), PIL.Image.new("RGB", (64, 64))
    return chat.count_image_tokens(vlm, prompt_inputs(processor, [frame], [""])[0]), vlm.config.text_config.hidden_size


def training_batch(
    processor: Any,
    images: Sequence[PIL.Image.Image],
    questions: Sequence[str],
    descriptions: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Batch of instruction tuning: the loss counts the answer's tokens and its end token, nothing else.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, L) long, labels -100 at prompt, image and
        padding positions, `pixel_values` (B patches, values) float and `image_grid_thw` (B, 3) long.
    """
    answers = [answer_ids(processor, description) for description in descriptions]
    return chat.with_labels(prompt_inputs(processor, images, questions), answers, processor.tokenizer.pad_token_id)


def vision_modules(vlm: Any) -> list[torch.nn.Module]:
    """What `frame_states` depends on: the vision side with its mergers."""
    return [base_model(vlm).model.visual]


def language_modules(vlm: Any) -> list[torch.nn.Module]:
    """The parts that instruction tuning trains: mergers, language model and head."""
    vlm = base_model(vlm)
    return [vlm.model.visual.merger, vlm.model.visual.deepstack_merger_list, vlm.model.language_model, vlm.lm_head]


def connector_names(vlm: Any) -> list[str]:
    """Modules that tuning by adapters trains as a whole: the mergers."""
    count = len(base_model(vlm).model.visual.deepstack_merger_list)
    return ["visual.merger", *(f"visual.deepstack_merger_list.{i}" for i in range(count))]


def _states(
    vlm: Any, inputs: Sequence[dict[str, torch.Tensor]], given: Sequence[torch.Tensor] | None, device: torch.device
) -> list[torch.Tensor]:
    """The given states on the VLM's device, or those of the vision side: B tensors (N_i, (1 + S) D)."""
    model = base_model(vlm).model
    if given is not None:
        return [states.to(device, model.visual.dtype) for states in given]
    pixels, grids = (torch.cat([item[name] for item in inputs]) for name in ("pixel_values", "image_grid_thw"))
    output = model.get_image_features(pixels.to(device, model.visual.dtype), grids.to(device))
    layers = [output.pooler_output, *output.deepstack_features]  # each a (N_i, D) per frame
    return [torch.cat(parts, dim=-1) for parts in zip(*layers, strict=True)]


def _image_outputs(states: Sequence[torch.Tensor], dim: int) -> BaseModelOutputWithDeepstackFeatures:
    """Frame states as `get_image_features` returns them, (N_i, D) of each frame in each layer."""
    layers: Any = list(zip(*(frame.split(dim, dim=-1) for frame in states), strict=True))
    return BaseModelOutputWithDeepstackFeatures(pooler_output=layers[0], deepstack_features=layers[1:])
