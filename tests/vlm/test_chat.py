"""The conversation that all families share: template, batches, sampling."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lego_pipeline.vlm import chat

GOLDEN = Path(__file__).parents[1] / "golden" / "sampling.npz"
ANSWER_LEADS = "{% if add_generation_prompt %}ASSISTANT: {% endif %}"


@pytest.fixture
def processor(tiny_components: dict[str, Any]) -> Any:
    """A processor whose template may be changed."""
    return copy.copy(tiny_components["vlm_processor"])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_gumbel_noise_draws_from_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sample = chat.SampleByGumbelNoise(generators(0), temperature=0.7, top_k=3)
    drawn = torch.tensor([sample(torch.zeros(1, 1, dtype=torch.long), scores).argmax().item() for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    expected = (scores[0, :3] / 0.7).softmax(0)
    assert torch.allclose(share[:3], expected, atol=0.025)
    assert share[3] == 0


def test_sampling_is_that_of_the_golden_arrays() -> None:
    golden = np.load(GOLDEN)
    sample = chat.SampleByGumbelNoise(generators(0, 1, 2), temperature=0.7, top_k=5)
    ids = torch.zeros(3, 1, dtype=torch.long)
    tokens = [sample(ids, torch.from_numpy(scores)).argmax(-1).tolist() for scores in golden["scores"]]
    assert tokens == golden["tokens"].tolist()


@pytest.mark.parametrize("lead", [ANSWER_LEADS, ANSWER_LEADS.replace(": {%", ":{%")])
def test_a_template_may_leave_the_space_before_an_answer_to_the_tokenizer(processor: Any, lead: str) -> None:
    processor.chat_template = processor.chat_template.replace(ANSWER_LEADS, lead)
    chat.check_template(processor)


def test_the_template_of_the_second_family_leads_to_the_answer(tiny_qwen_vlm: tuple[Any, Any]) -> None:
    chat.check_template(tiny_qwen_vlm[1])


@pytest.mark.parametrize("lead", ["", ANSWER_LEADS.replace(": {%", ": THINK {%")])
def test_a_template_that_does_not_lead_to_the_answer_is_refused(processor: Any, lead: str) -> None:
    processor.chat_template = processor.chat_template.replace(ANSWER_LEADS, lead)
    with pytest.raises(ValueError, match="`vlm` must have a chat template that puts an answer right after"):
        chat.check_template(processor)


def test_a_begin_token_is_not_doubled_by_a_template_that_writes_it(processor: Any, make_frame: Any) -> None:
    frames, questions = [make_frame(16, 16)], ["Why?"]
    plain = chat.prompt_inputs(processor, frames, questions)[0]["input_ids"]
    processor.chat_template = "<s>" + processor.chat_template
    assert torch.equal(chat.prompt_inputs(processor, frames, questions)[0]["input_ids"], plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_along_the_tokens_are_padded_and_others_joined(side: str) -> None:
    inputs = [
        {
            "input_ids": torch.arange(1, n + 1)[None],
            "attention_mask": torch.ones(1, n, dtype=torch.long),
            "types": torch.ones(1, n, dtype=torch.long),
            "pixel_values": torch.full((3, 2), float(n)),
        }
        for n in (4, 2)
    ]
    batch = chat.join(inputs, [[7], [8, 9]], 99, side)
    ids = {"left": [[1, 2, 3, 4, 7], [99, 1, 2, 8, 9]], "right": [[1, 2, 3, 4, 7], [1, 2, 8, 9, 99]]}[side]
    types = {"left": [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]], "right": [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]}[side]
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == [[int(i != 99) for i in row] for row in ids]
    assert batch["types"].tolist() == types
    assert batch["pixel_values"][:, 0].tolist() == [4, 4, 4, 2, 2, 2]
