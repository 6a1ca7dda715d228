"""One question and one answer about a frame: what the VLM families share.

The conversation is laid out by the processor's own chat template: one user turn with the image and the question, one
assistant turn with the description. Text states are those that *predict* each answer token, end token included: with
P prompt positions (image expanded) and T answer tokens, positions P-1 ... P+T-2 of the last layer after the final
norm. One teacher-forced forward gives the same rows as step-by-step generation (`BolinLai/LEGO:
vllm/llava/eval/run_llava_in_loop.py`), so a description written by hand takes the same way as a generated one.

The frame reaches the language model as an encoder output that was made beforehand (`mm_encoder_outputs` of
transformers >= 5.18), so that a frame seen before costs no vision work.

Letters: B batch, L tokens of a row, N_i image tokens, T answer tokens, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

# The linear layers of the language model, which all families of transformers name alike; none of the vision tower.
LANGUAGE_LINEARS = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"


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


def question_turn(question: str) -> dict[str, Any]:
    """The user's turn: the frame, then the question."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def prompt_text(processor: Any, question: str) -> str:
    """Conversation up to where the answer begins, image placeholder included."""
    return processor.apply_chat_template([question_turn(question)], add_generation_prompt=True)


def answer_ids(processor: Any, description: str) -> list[int]:
    """Token ids of an answer with its end token, tokenised apart from the prompt so that the prompt stays fixed."""
    tokenizer = processor.tokenizer
    return [*tokenizer(description.strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def prompt_inputs(
    processor: Any, images: Sequence[PIL.Image.Image], questions: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """Everything that the processor returns for each sample alone: `input_ids` (1, P), pixels and further keys."""
    inputs = []
    for image, question in zip(images, questions, strict=True):
        text = prompt_text(processor, question)
        begin = processor.tokenizer.bos_token  # some templates write it, and the tokenizer must not add another
        special = not (begin and text.startswith(begin))
        inputs.append(dict(processor(images=image, text=text, add_special_tokens=special, return_tensors="pt")))
    return inputs


def join(
    inputs: Sequence[dict[str, torch.Tensor]], answers: Sequence[Sequence[int]], pad_id: int, side: str
) -> dict[str, torch.Tensor]:
    """One batch of conversations.

    Args:
        inputs: of `prompt_inputs`.
        answers: token ids that follow each prompt; empty ones for the prompts alone.
        pad_id: of the tokenizer.
        side: of the padding, "left" to generate and "right" to train and embed.

    Returns:
        `input_ids` and `attention_mask` (B, L), other keys that run along the tokens padded by zeros (the answer is
        text, type 0), and what belongs to the frames (pixels, grids) joined along the first axis.
    """
    lengths = [item["input_ids"].shape[1] + len(answer) for item, answer in zip(inputs, answers, strict=True)]
    places = [slice(max(lengths) - n, None) if side == "left" else slice(0, n) for n in lengths]
    batch = {"attention_mask": torch.zeros(len(inputs), max(lengths), dtype=torch.long)}
    for row, place in zip(batch["attention_mask"], places, strict=True):
        row[place] = 1
    for name, tensor in inputs[0].items():
        if name == "attention_mask":
            continue
        if tensor.shape != inputs[0]["input_ids"].shape:
            batch[name] = torch.cat([item[name] for item in inputs])
            continue
        is_ids = name == "input_ids"
        batch[name] = tensor.new_full((len(inputs), max(lengths)), pad_id if is_ids else 0)
        for row, place, item, answer in zip(batch[name], places, inputs, answers, strict=True):
            end = tensor.new_tensor(answer) if is_ids else tensor.new_zeros(len(answer))
            row[place] = torch.cat([item[name][0], end])
    return batch


def with_labels(
    inputs: Sequence[dict[str, torch.Tensor]], answers: Sequence[Sequence[int]], pad_id: int
) -> dict[str, torch.Tensor]:
    """A batch of instruction tuning, padded on the right, with `labels` (B, L): -100 outside the answers."""
    batch = join(inputs, answers, pad_id, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, item in zip(labels, inputs, strict=True):
        row[: item["input_ids"].shape[1]] = -100
    return {**batch, "labels": labels}


@torch.no_grad()
def generate(
    vlm: Any,
    processor: Any,
    inputs: Sequence[dict[str, torch.Tensor]],
    image_outputs: Any,
    device: torch.device,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generators: Sequence[torch.Generator | None] | None,
) -> list[str]:
    """Answers to a batch of questions.

    Args:
        vlm: a transformers model, wrapped by peft or not.
        processor: of the VLM.
        inputs: of `prompt_inputs`.
        image_outputs: what the family's vision side gives, as the model's own `get_image_features` would.
        device: on which the VLM computes.
        max_new_tokens, temperature, top_k, generators: see a family's `generate`.

    Returns:
        B stripped texts without special tokens.

    Raises:
        ValueError: a question leaves no room for the answer.
    """
    tokenizer = processor.tokenizer
    batch = _on(device, join(inputs, [[]] * len(inputs), tokenizer.pad_token_id, "left"))
    length = batch["input_ids"].shape[1]
    _check_room(vlm, length, max_new_tokens)
    processors = LogitsProcessorList()
    if temperature > 0:
        own = [generator or _fresh_generator() for generator in generators or [None] * len(inputs)]
        processors.append(SampleByGumbelNoise(own, temperature, top_k))
    sequences = vlm.generate(
        **batch,
        mm_encoder_outputs={"image": image_outputs},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=processors,
    )
    answers = tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def text_states(
    vlm: Any,
    processor: Any,
    inputs: Sequence[dict[str, torch.Tensor]],
    answers: Sequence[Sequence[int]],
    image_outputs: Any,
    device: torch.device,
) -> list[torch.Tensor]:
    """States that predict the answers' tokens, by one teacher-forced forward.

    Args:
        vlm, processor, inputs, image_outputs, device: as for `generate`.
        answers: token ids of each answer.

    Returns:
        B tensors (T, D) of the last layer after the final norm.

    Raises:
        ValueError: a question and its answer are longer than what the VLM reads.
    """
    batch = _on(device, join(inputs, answers, processor.tokenizer.pad_token_id, "right"))
    starts = [item["input_ids"].shape[1] - 1 for item in inputs]
    for start, answer in zip(starts, answers, strict=True):
        _check_room(vlm, start + 1, len(answer))
    output = vlm(  # not `vlm.model`, whose call an offloaded VLM wouldn't notice
        **batch,
        mm_encoder_outputs={"image": image_outputs},
        output_hidden_states=True,
        logits_to_keep=1,
        use_cache=False,
    )
    states = output.hidden_states[-1]  # (B, L, D), after the final norm
    return [states[i, start : start + len(answers[i])] for i, start in enumerate(starts)]


def check_template(processor: Any) -> None:
    """The rule for the chat template of a VLM that is tuned.

    A template that ignores `add_generation_prompt`, or writes something between it and the answer, would have the VLM
    tuned on another text than the one that it continues later.

    Raises:
        ValueError: the answer of a whole conversation doesn't follow the prompt.
    """
    question, answer = "What is done?", "The left hand opens it."
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([question_turn(question), turn])
    prompt = prompt_text(processor, question)
    if prompt == processor.apply_chat_template([question_turn(question)]) or not _follows(whole, prompt, answer):
        raise ValueError(
            "`vlm` must have a chat template that puts an answer right after what `add_generation_prompt=True` gives, "
            f"got {prompt!r} before an answer and {whole!r} with one; correct `chat_template.jinja` beside the "
            "processor."
        )


def _follows(whole: str, prompt: str, answer: str) -> bool:
    """Whether a text begins with prompt and answer, spaces apart: tokenizers write the one between them."""
    return "".join(whole.split()).startswith("".join((prompt + answer).split()))


def count_image_tokens(vlm: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Places that the frame takes in a prompt."""
    return int((inputs["input_ids"] == vlm.config.image_token_id).sum())


def _check_room(vlm: Any, num_prompt: int, num_answer: int) -> None:
    length = vlm.config.text_config.max_position_embeddings
    if num_prompt + num_answer > length:
        raise ValueError(
            f"`action` and `description` must fit into the {length} tokens that the VLM reads, got {num_prompt} of "
            f"frame and question and up to {num_answer} of the description; pass shorter texts."
        )


def _on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on a device, without the pixels, which the vision side has seen already."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "pixel_values"}


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
