"""Qwen3-VL: what is peculiar to it. What it shares with other families is in test_families.py."""

import copy
from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch

from lego_pipeline.vlm import chat, qwen3_vl

QUESTIONS = ["How does one open the drawer?", "Why?"]
DESCRIPTIONS = ["She pulls.", "With the left hand, the person holds the plate."]


@pytest.fixture
def vlm(tiny_qwen_vlm: tuple[Any, Any]) -> Any:
    return tiny_qwen_vlm[0]


@pytest.fixture
def processor(tiny_qwen_vlm: tuple[Any, Any]) -> Any:
    return tiny_qwen_vlm[1]


@pytest.fixture
def frames(make_frame: Callable[..., PIL.Image.Image]) -> list[PIL.Image.Image]:
    return [make_frame(96, 54, seed=0), make_frame(40, 70, seed=1)]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def test_text_states_are_those_that_predict_each_token_step_by_step(vlm: Any, processor: Any, frames: list) -> None:
    for i, enhancement in enumerate(qwen3_vl.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS)):
        prompt = qwen3_vl.prompt_inputs(processor, [frames[i]], [QUESTIONS[i]])
        answer = chat.answer_ids(processor, DESCRIPTIONS[i])
        rows = []
        for k in range(len(answer)):
            inputs = chat.join(prompt, [answer[:k]], processor.tokenizer.pad_token_id, "right")
            rows.append(vlm.model(**inputs).last_hidden_state[0, -1])
        assert torch.allclose(enhancement.text_embeds, torch.stack(rows), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_head_on_the_text_states_gives_the_tokens_that_greedy_generation_chose(
    vlm: Any, processor: Any, frames: list
) -> None:
    answers = qwen3_vl.generate(vlm, processor, frames, QUESTIONS, max_new_tokens=6, temperature=0)
    for answer, enhancement in zip(answers, qwen3_vl.embed(vlm, processor, frames, QUESTIONS, answers), strict=True):
        expected = chat.answer_ids(processor, answer)[:-1]
        assert expected
        assert vlm.lm_head(enhancement.text_embeds).argmax(-1).tolist()[: len(expected)] == expected


@torch.no_grad()
def test_the_image_embeds_are_the_mergers_output(vlm: Any, processor: Any, frames: list) -> None:
    inputs = qwen3_vl.prompt_inputs(processor, frames, QUESTIONS)
    for item, enhancement in zip(inputs, qwen3_vl.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS), strict=True):
        output = vlm.model.visual(item["pixel_values"], grid_thw=item["image_grid_thw"])
        assert torch.allclose(enhancement.image_embeds, output.pooler_output, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_deep_stack_reaches_the_language_model(vlm: Any, processor: Any, frames: list) -> None:
    states = qwen3_vl.frame_states(vlm, processor, frames[:1])[0]
    dim = vlm.config.text_config.hidden_size
    assert states.shape[1] == 3 * dim  # merger and two deep-stack layers
    changed = states.clone()
    changed[:, 2 * dim :] = 0
    arguments = (vlm, processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])
    whole, without = (qwen3_vl.embed(*arguments, frame_states=[given])[0] for given in (states, changed))
    assert torch.equal(whole.image_embeds, without.image_embeds)
    assert not torch.allclose(whole.text_embeds, without.text_embeds)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}])
def test_a_description_does_not_depend_on_its_batch(vlm: Any, processor: Any, frames: list, settings: dict) -> None:
    def describe(rows: list[int]) -> list[str]:
        pictures, questions = [frames[i] for i in rows], [QUESTIONS[i] for i in rows]
        own = generators(*rows)
        return qwen3_vl.generate(vlm, processor, pictures, questions, max_new_tokens=6, generators=own, **settings)

    assert describe([0, 1]) == describe([0]) + describe([1])


def test_every_frame_takes_the_same_number_of_tokens(vlm: Any, processor: Any, frames: list) -> None:
    counts = {chat.count_image_tokens(vlm, item) for item in qwen3_vl.prompt_inputs(processor, frames, QUESTIONS)}
    assert counts == {qwen3_vl.sizes(vlm, processor)[0]} == {4}


@pytest.mark.parametrize(
    ("least", "most", "side"),
    [(65536, 16777216, 512), (256, 256 * 256, 256), (600 * 600, 16777216, 576), (1, 10, 32)],
)
def test_the_working_size_lies_between_the_processors_bounds(processor: Any, least: int, most: int, side: int) -> None:
    changed = copy.copy(processor)
    changed.image_processor = copy.copy(processor.image_processor)
    changed.image_processor.size = {"shortest_edge": least, "longest_edge": most}
    assert qwen3_vl.working_size(changed) == side


def test_all_keys_of_the_processor_reach_the_model(vlm: Any, processor: Any, frames: list) -> None:
    batch = qwen3_vl.training_batch(processor, frames, QUESTIONS, DESCRIPTIONS)
    assert batch.keys() == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"} | {
        "labels"
    }
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    image = batch["input_ids"] == vlm.config.image_token_id
    assert torch.equal(batch["mm_token_type_ids"] == 1, image)
