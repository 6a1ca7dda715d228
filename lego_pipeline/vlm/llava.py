"""LLaVA through `LlavaForConditionalGeneration`: describe an action in a frame, and embed frame and description.

The conversation, its text states and sampling are those of `lego_pipeline.vlm.chat`. The frame's states are the
vision tower's, as the config selects them; the connector is the multimodal projector.

Letters: B batch, N_i image tokens, D_v width of the vision states, T answer tokens, D hidden width.
"""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from lego_pipeline.vlm import chat
from lego_pipeline.vlm.base import Enhancement, active_module, base_model, wake
from lego_pipeline.vlm.chat import answer_ids

LORA_TARGETS = chat.LANGUAGE_LINEARS


def prompt_inputs(
    processor: Any, images: Sequence[PIL.Image.Image], questions: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """Processor output of each sample alone: `input_ids` (1, P), `pixel_values` (1, 3, H, W)."""
    return chat.prompt_inputs(processor, [image.convert("RGB") for image in images], questions)


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
    """Descriptions of how the asked actions are carried out in the frames.

    Args:
        images: B frames of any size.
        questions: B questions, the pipeline's question template filled with the action.
        max_new_tokens: upper bound of answer tokens.
        temperature: 0 takes the likeliest token; the release samples at 0.2.
        top_k: number of candidates per token, 0 for all.
        generators: one per sample; a missing one is seeded freshly, the global generator is never used.
        frame_states: B results of the function of this name; given, the vision tower is not called.

    Returns:
        B stripped texts without special tokens.

    Raises:
        ValueError: a question leaves no room for the answer.
    """
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    with torch.no_grad():
        features = _projected(vlm, inputs, frame_states, device)
    return chat.generate(
        vlm,
        processor,
        inputs,
        _image_outputs(features),
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
    """Embeddings of frames and descriptions by one teacher-forced forward.

    Args:
        images, questions, frame_states: as for `generate`.
        descriptions: B answers, generated or written by hand.

    Returns:
        B enhancements with `image_embeds` (N_i, D) and `text_embeds` (T, D) on the VLM's device, where T counts the
        answer's tokens with the end token.

    Raises:
        ValueError: a question and its description are longer than what the VLM reads.
    """
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    answers = [answer_ids(processor, description) for description in descriptions]
    features = _projected(vlm, inputs, frame_states, device)
    states = chat.text_states(vlm, processor, inputs, answers, _image_outputs(features), device)
    return [Enhancement(*row) for row in zip(descriptions, features, states, strict=True)]


@torch.no_grad()
def frame_states(vlm: Any, processor: Any, images: Sequence[PIL.Image.Image]) -> list[torch.Tensor]:
    """States of the vision tower before the projector, in the layers and places that the VLM's config selects.

    Returns:
        B tensors (N_i, D_v) on the VLM's device.
    """
    inputs = prompt_inputs(processor, images, [""] * len(images))
    return list(_vision_states(base_model(vlm), inputs, wake(vlm)))


def connector(vlm: Any) -> torch.nn.Module:
    """The multimodal projector, D_v -> D."""
    return active_module(base_model(vlm).model.multi_modal_projector)


def connector_settings(vlm: Any) -> dict[str, Any]:
    """What `build_connector` needs, as JSON has it."""
    layers, config = connector(vlm), base_model(vlm).config
    return {
        "vision_dim": layers.linear_1.in_features,
        "dim": layers.linear_1.out_features,
        "activation": config.projector_hidden_act,
        "bias": layers.linear_1.bias is not None,
    }


def build_connector(settings: dict[str, Any]) -> torch.nn.Module:
    """A multimodal projector without the VLM around it; its weights are loaded afterwards."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=settings["vision_dim"], num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=settings["dim"], num_attention_heads=1),
        projector_hidden_act=settings["activation"],
        multimodal_projector_bias=settings["bias"],
    )
    return LlavaMultiModalProjector(config)


def image_embeds(connector: torch.nn.Module, states: torch.Tensor, dim: int) -> torch.Tensor:
    """F_img (..., N_i, D) of frame states (..., N_i, D_v), computed where and in what the connector's weights are."""
    weight = next(connector.parameters())
    return connector(states.to(weight.device, weight.dtype))


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
        `input_ids`, `attention_mask`, `labels` (B, L) long, labels -100 at prompt, image and padding positions, and
        `pixel_values` (B, 3, H, W) float.
    """
    answers = [answer_ids(processor, description) for description in descriptions]
    return chat.with_labels(prompt_inputs(processor, images, questions), answers, processor.tokenizer.pad_token_id)


def vision_modules(vlm: Any) -> list[torch.nn.Module]:
    """What `frame_states` depends on: the vision tower."""
    return [base_model(vlm).model.vision_tower]


def language_modules(vlm: Any) -> list[torch.nn.Module]:
    """The parts that instruction tuning trains: multimodal projector, language model and head."""
    vlm = base_model(vlm)
    return [vlm.model.multi_modal_projector, vlm.model.language_model, vlm.lm_head]


def connector_names(vlm: Any) -> list[str]:
    """Modules that tuning by adapters trains as a whole."""
    return ["multi_modal_projector"]


def _vision_states(vlm: Any, inputs: Sequence[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """(B, N_i, D_v), as `LlavaModel.get_image_features` selects them."""
    tower, config = vlm.model.vision_tower, vlm.config
    pixels = torch.cat([item["pixel_values"] for item in inputs]).to(device, tower.dtype)
    states = tower(pixels, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [layer[:, 1:] for layer in chosen]
    return torch.cat(chosen, dim=-1)


def _projected(
    vlm: Any, inputs: Sequence[dict[str, torch.Tensor]], states: Sequence[torch.Tensor] | None, device: torch.device
) -> list[torch.Tensor]:
    """F_img (N_i, D) of each sample."""
    vlm = base_model(vlm)
    together = _vision_states(vlm, inputs, device) if states is None else torch.stack(list(states))
    projector = vlm.model.multi_modal_projector
    floats = (weight.dtype for weight in projector.parameters() if weight.is_floating_point())
    return list(projector(together.to(device, next(floats, vlm.dtype))))  # its weights may be in 4 or 8 bits


def _image_outputs(features: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    """F_img of each frame as `get_image_features` returns it: a list, whatever the field's declaration says."""
    return BaseModelOutputWithPooling(pooler_output=features)  # ty: ignore[invalid-argument-type]
