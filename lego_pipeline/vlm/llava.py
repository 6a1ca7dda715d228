"""LLaVA through `LlavaForConditionalGeneration`: describe an action in a frame, and embed frame and description.

The conversation is laid out by the processor's own chat template: one user turn with the image and the question, one
assistant turn with the description. Text states are those that *predict* each answer token, end token included: with
P prompt positions (image expanded) and T answer tokens, positions P-1 ... P+T-2 of the last layer after the final
norm. One teacher-forced forward gives the same rows as step-by-step generation (`BolinLai/LEGO:
vllm/llava/eval/run_llava_in_loop.py`), so a description written by hand takes the same way as a generated one.

Letters: B batch, N_i image tokens, T answer tokens, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from lego_pipeline.vlm.base import Enhancement, wake


class SampleByGumbelNoise(LogitsProcessor):
    """Turns greedy search into sampling with a generator of its own for each row (the Gumbel-max trick).

    argmax(logits / temperature + Gumbel noise) is distributed as softmax(logits / temperature). The noise of a row
    comes from that row's generator alone, so a sample depends neither on its batch nor on the global generator.
    """

    def __init__(self, generators: Sequence[torch.Generator], temperature: float, top_k: int):
        self.generators, self.temperature, self.top_k = generators, temperature, top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature  # (B, V)
        if self.top_k and self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, device=g.device) for g in self.generators])
        exponential = -torch.log(uniform.clamp(1e-38, 1 - 1e-7))
        return scores - torch.log(exponential).to(scores.device)


def prompt_text(processor: Any, question: str) -> str:
    """Conversation up to where the answer begins, image placeholder included."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answer_ids(processor: Any, description: str) -> list[int]:
    """Token ids of an answer with its end token, tokenised apart from the prompt so that the prompt stays fixed."""
    tokenizer = processor.tokenizer
    return [*tokenizer(description.strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def prompt_inputs(processor: Any, images: Sequence[PIL.Image.Image], questions: Sequence[str]) -> list[dict]:
    """Processor output of each sample alone: `input_ids` (1, P), `pixel_values` (1, 3, H, W)."""
    return [
        processor(images=image.convert("RGB"), text=prompt_text(processor, question), return_tensors="pt")
        for image, question in zip(images, questions, strict=True)
    ]


def pad_sequences(rows: Sequence[torch.Tensor], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks 1-D id tensors to (B, L) with padding on `side`, and their attention mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@torch.no_grad()
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
) -> list[str]:
    """Descriptions of how the asked actions are carried out in the frames.

    Args:
        images: B frames of any size.
        questions: B questions, the pipeline's question template filled with the action.
        max_new_tokens: upper bound of answer tokens.
        temperature: 0 takes the likeliest token; the release samples at 0.2.
        top_k: number of candidates per token, 0 for all.
        generators: one per sample; a missing one is seeded freshly, the global generator is never used.

    Returns:
        B stripped texts without special tokens.

    Raises:
        ValueError: a question leaves no room for the answer.
    """
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    tokenizer = processor.tokenizer
    ids, mask = pad_sequences([item["input_ids"][0] for item in inputs], tokenizer.pad_token_id, "left")
    _check_room(vlm, ids.shape[1], max_new_tokens)
    processors = LogitsProcessorList()
    if temperature > 0:
        given = list(generators or [None] * len(images))
        own = [generator or _fresh_generator() for generator in given]
        processors.append(SampleByGumbelNoise(own, temperature, top_k))
    sequences = vlm.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        pixel_values=torch.cat([item["pixel_values"] for item in inputs]).to(device, vlm.dtype),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=processors,
    )
    answers = tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def embed(
    vlm: Any,
    processor: Any,
    images: Sequence[PIL.Image.Image],
    questions: Sequence[str],
    descriptions: Sequence[str],
) -> list[Enhancement]:
    """Embeddings of frames and descriptions by one teacher-forced forward.

    Args:
        images, questions: as for `generate`.
        descriptions: B answers, generated or written by hand.

    Returns:
        B enhancements with `image_embeds` (N_i, D) and `text_embeds` (T, D) on the VLM's device, where T counts the
        answer's tokens with the end token.

    Raises:
        ValueError: a question and its description are longer than what the VLM reads.
    """
    inputs, device = prompt_inputs(processor, images, questions), wake(vlm)
    answers = [torch.tensor(answer_ids(processor, description)) for description in descriptions]
    rows = [torch.cat([item["input_ids"][0], answer]) for item, answer in zip(inputs, answers, strict=True)]
    for row, answer in zip(rows, answers, strict=True):
        _check_room(vlm, len(row) - len(answer), len(answer))
    ids, mask = pad_sequences(rows, processor.tokenizer.pad_token_id, "right")
    output = vlm(  # not `vlm.model`, whose call an offloaded VLM wouldn't notice
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        pixel_values=torch.cat([item["pixel_values"] for item in inputs]).to(device, vlm.dtype),
        output_hidden_states=True,
        logits_to_keep=1,
    )
    states = output.hidden_states[-1]  # (B, L, D), after the final norm
    image_embeds = output.image_hidden_states.reshape(len(images), -1, states.shape[-1])  # (B, N_i, D)
    enhancements = []
    for i, (item, answer) in enumerate(zip(inputs, answers, strict=True)):
        first = item["input_ids"].shape[1] - 1
        text_embeds = states[i, first : first + len(answer)]
        enhancements.append(Enhancement(descriptions[i], image_embeds[i], text_embeds))
    return enhancements


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
    inputs = prompt_inputs(processor, images, questions)
    answers = [torch.tensor(answer_ids(processor, description)) for description in descriptions]
    prompts = [item["input_ids"][0] for item in inputs]
    rows = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = pad_sequences(rows, processor.tokenizer.pad_token_id, "right")
    labels = ids.masked_fill(mask == 0, -100)
    for i, prompt in enumerate(prompts):
        labels[i, : len(prompt)] = -100
    pixel_values = torch.cat([item["pixel_values"] for item in inputs])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixel_values}


def language_modules(vlm: Any) -> list[torch.nn.Module]:
    """The parts that instruction tuning trains: multimodal projector, language model and head."""
    return [vlm.model.multi_modal_projector, vlm.model.language_model, vlm.lm_head]


def _check_room(vlm: Any, num_prompt: int, num_answer: int) -> None:
    length = vlm.config.text_config.max_position_embeddings
    if num_prompt + num_answer > length:
        raise ValueError(
            f"`action` and `description` must fit into the {length} tokens that the VLM reads, got {num_prompt} of "
            f"frame and question and up to {num_answer} of the description; pass shorter texts."
        )


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
