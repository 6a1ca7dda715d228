"""LLaVA: the teacher-forced rows are those of step-by-step generation, sampling is each sample's own."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import BitsAndBytesConfig

from lego_pipeline.enhance import make_recipe
from lego_pipeline.vlm import chat, llava

REFERENCE = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference")) / "vllm"
QUESTIONS = ["How does one open the drawer?", "How does the person properly wash a plate?", "Why?"]
DESCRIPTIONS = ["She pulls.", "With the left hand, the person holds the plate.", "x"]


@pytest.fixture
def vlm(tiny_components: dict[str, Any]) -> LlavaForConditionalGeneration:
    return tiny_components["vlm"]


@pytest.fixture
def processor(tiny_components: dict[str, Any]) -> Any:
    return tiny_components["vlm_processor"]


@pytest.fixture
def frames(make_frame: Callable[..., PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Three frames of different sizes."""
    return [make_frame(32, 32, seed=0), make_frame(48, 20, seed=1), make_frame(16, 40, seed=2)]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes (extra `quantization`) is not installed")
@torch.no_grad()
def test_a_vlm_that_is_quantized_as_a_whole_describes_and_embeds_but_fills_no_cache(
    vlm: Any, processor: Any, frames: list, tmp_path: Path
) -> None:
    config = copy.deepcopy(vlm.config)
    for part in (config.vision_config, config.text_config):  # the widths that quantization wants
        part.hidden_size, part.intermediate_size, part.num_attention_heads = 64, 64, 2
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 32
    vlm = LlavaForConditionalGeneration(config).eval()
    vlm.save_pretrained(tmp_path)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True)
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=in_4_bits)
    assert type(small.model.multi_modal_projector.linear_1).__name__ == "Linear4bit"
    [text] = llava.generate(small, processor, frames[:1], QUESTIONS[:1], max_new_tokens=2, temperature=0)
    [found] = llava.embed(small, processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])
    [whole] = llava.embed(vlm, processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])
    assert isinstance(text, str) and found.image_embeds.is_floating_point()
    assert torch.nn.functional.cosine_similarity(found.image_embeds.float(), whole.image_embeds).min() > 0.8
    with pytest.raises(ValueError, match="`vlm` must have a projector of floats where there is a cache"):
        make_recipe(small, processor)


@torch.no_grad()
def last_state(vlm: Any, processor: Any, image: PIL.Image.Image, question: str, answer: list[int]) -> torch.Tensor:
    """Last-layer state after the final norm at the last position of prompt + answer tokens: (D,)."""
    inputs = processor(images=image, text=chat.prompt_text(processor, question), return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    return vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"]).last_hidden_state[0, -1]


@torch.no_grad()
def test_text_states_are_those_that_predict_each_token_step_by_step(vlm: Any, processor: Any, frames: list) -> None:
    enhancement = llava.embed(vlm, processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])[0]
    answer = llava.answer_ids(processor, DESCRIPTIONS[0])
    rows = [last_state(vlm, processor, frames[0], QUESTIONS[0], answer[:k]) for k in range(len(answer))]
    assert enhancement.text_embeds.shape == (len(answer), vlm.config.text_config.hidden_size)
    assert torch.allclose(enhancement.text_embeds, torch.stack(rows), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_head_on_the_text_states_gives_the_tokens_that_greedy_generation_chose(
    vlm: Any, processor: Any, frames: list
) -> None:
    answers = llava.generate(vlm, processor, frames, QUESTIONS, max_new_tokens=6, temperature=0)
    for i, enhancement in enumerate(llava.embed(vlm, processor, frames, QUESTIONS, answers)):
        expected = llava.answer_ids(processor, answers[i])[:-1]
        assert expected
        assert vlm.lm_head(enhancement.text_embeds).argmax(-1).tolist()[: len(expected)] == expected


@torch.no_grad()
def test_the_image_embeds_are_the_projectors_output_for_the_frame(vlm: Any, processor: Any, frames: list) -> None:
    pixels = torch.cat([item["pixel_values"] for item in llava.prompt_inputs(processor, frames, QUESTIONS)])
    states = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = vlm.model.multi_modal_projector(states)
    for i, enhancement in enumerate(llava.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS)):
        assert torch.allclose(enhancement.image_embeds, expected[i], rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_image_embeds_depend_on_the_frame_alone(vlm: Any, processor: Any, frames: list) -> None:
    first, second = llava.embed(vlm, processor, [frames[0]] * 2, QUESTIONS[:2], DESCRIPTIONS[:2])
    assert torch.allclose(first.image_embeds, second.image_embeds, rtol=0, atol=1e-6)


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch(vlm: Any, processor: Any, frames: list) -> None:
    together = llava.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS)
    for i, enhancement in enumerate(together):
        alone = llava.embed(vlm, processor, [frames[i]], [QUESTIONS[i]], [DESCRIPTIONS[i]])[0]
        assert torch.allclose(enhancement.text_embeds, alone.text_embeds, rtol=0, atol=2e-5)
        assert torch.allclose(enhancement.image_embeds, alone.image_embeds, rtol=0, atol=2e-5)


def test_gradients_pass_through_embed(tiny_components: dict[str, Any], processor: Any, frames: list) -> None:
    vlm = tiny_components["vlm"]
    bias = vlm.model.multi_modal_projector.linear_2.bias
    bias.requires_grad_(True)
    try:
        assert llava.embed(vlm, processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])[0].text_embeds.requires_grad
    finally:
        bias.requires_grad_(False)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0}])
def test_a_description_does_not_depend_on_its_batch(
    vlm: Any, processor: Any, frames: list, settings: dict[str, Any]
) -> None:
    together = llava.generate(
        vlm, processor, frames, QUESTIONS, max_new_tokens=6, generators=generators(1, 2, 3), **settings
    )
    alone = [
        llava.generate(
            vlm, processor, [frames[i]], [QUESTIONS[i]], max_new_tokens=6, generators=generators(i + 1), **settings
        )[0]
        for i in range(3)
    ]
    assert together == alone


def test_seeds_decide_about_a_sampled_description(vlm: Any, processor: Any, frames: list) -> None:
    def describe(seed: int) -> list[str]:
        settings = {"max_new_tokens": 8, "temperature": 2.0, "generators": generators(seed)}
        return llava.generate(vlm, processor, frames[:1], QUESTIONS[:1], **settings)

    assert describe(0) == describe(0)
    assert describe(0) != describe(1)


@pytest.mark.parametrize("given", [True, False])
def test_the_global_generator_is_neither_read_nor_moved(vlm: Any, processor: Any, frames: list, given: bool) -> None:
    state = torch.get_rng_state()
    llava.generate(vlm, processor, frames[:1], QUESTIONS[:1], generators=generators(0) if given else None)
    assert torch.equal(torch.get_rng_state(), state)


def test_at_most_the_asked_number_of_tokens_is_generated(vlm: Any, processor: Any, frames: list) -> None:
    answer = llava.generate(vlm, processor, frames[:1], QUESTIONS[:1], max_new_tokens=3, temperature=0)[0]
    assert len(llava.answer_ids(processor, answer)) <= 4


def test_temperature_zero_and_top_one_agree(vlm: Any, processor: Any, frames: list) -> None:
    greedy = llava.generate(vlm, processor, frames, QUESTIONS, max_new_tokens=5, temperature=0)
    top_one = llava.generate(vlm, processor, frames, QUESTIONS, max_new_tokens=5, temperature=2.0, top_k=1)
    assert greedy == top_one


def test_the_loss_counts_the_answer_with_its_end_and_nothing_else(processor: Any, frames: list) -> None:
    batch = llava.training_batch(processor, frames, QUESTIONS, DESCRIPTIONS)
    for i, description in enumerate(DESCRIPTIONS):
        counted = batch["labels"][i] != -100
        assert batch["input_ids"][i][counted].tolist() == llava.answer_ids(processor, description)
        assert batch["labels"][i][counted].tolist() == llava.answer_ids(processor, description)
        assert batch["attention_mask"][i][counted].all()


def test_padding_of_a_training_batch_is_masked(processor: Any, frames: list) -> None:
    batch = llava.training_batch(processor, frames, QUESTIONS, DESCRIPTIONS)
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [
        llava.training_batch(processor, [frame], [question], [description])["input_ids"].shape[1]
        for frame, question, description in zip(frames, QUESTIONS, DESCRIPTIONS, strict=True)
    ]
    assert lengths == alone


@torch.no_grad()
def test_the_training_loss_does_not_depend_on_padding(vlm: Any, processor: Any, frames: list) -> None:
    def loss_sum(indices: list[int]) -> float:
        arguments = ([source[i] for i in indices] for source in (frames, QUESTIONS, DESCRIPTIONS))
        batch = llava.training_batch(processor, *arguments)
        return vlm(**batch).loss.item() * (batch["labels"][:, 1:] != -100).sum().item()

    assert loss_sum([0, 1, 2]) == pytest.approx(sum(loss_sum([i]) for i in range(3)), rel=1e-5)


def test_training_and_generation_share_the_prompt(processor: Any, frames: list) -> None:
    prompt = llava.prompt_inputs(processor, frames[:1], QUESTIONS[:1])[0]["input_ids"][0]
    row = llava.training_batch(processor, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])["input_ids"][0]
    assert torch.equal(row[: len(prompt)], prompt)


def test_instruction_tuning_covers_all_but_the_vision_tower(vlm: Any) -> None:
    trained = {id(p) for module in llava.language_modules(vlm) for p in module.parameters()}
    left = {name.split(".")[1] for name, p in vlm.named_parameters() if id(p) not in trained}
    assert left == {"vision_tower"}


@pytest.fixture(scope="module")
def released() -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """The release's tiny VLM in transformers' class, and what the released code made of one frame."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference arrays in {REFERENCE}; set LEGO_REFERENCE_DIR")
    facts = json.loads((REFERENCE / "tiny_llava_config.json").read_text())
    arrays = {name: torch.from_numpy(array) for name, array in np.load(REFERENCE / "vllm_features.npz").items()}
    image_token = facts["llama"]["vocab_size"]  # a new last token; the release marks the image by a negative id
    language = LlamaConfig(**{**facts["llama"], "vocab_size": image_token + 1})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**facts["vision"]),
        text_config=language,
        image_token_index=image_token,
        projector_hidden_act="linear",
        vision_feature_layer=facts["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
    )
    vlm = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    weights = {}
    for name, tensor in load_file(REFERENCE / "tiny_llava_state_dict.safetensors").items():
        tensor = tensor.float()
        if name.startswith("model.vision_tower."):
            name = "model.vision_tower." + name.removeprefix("model.vision_tower.vision_tower.vision_model.")
        elif name.startswith("model.mm_projector."):
            name = name.replace("mm_projector", "multi_modal_projector.linear_1")
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
        if not name.endswith("inv_freq"):
            weights[name] = tensor
    width = facts["llama"]["hidden_size"]
    weights["model.multi_modal_projector.linear_2.weight"] = torch.eye(width)
    weights["model.multi_modal_projector.linear_2.bias"] = torch.zeros(width)
    vlm.load_state_dict(weights)
    return vlm, arrays


@pytest.fixture
def released_inputs(released: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The release's token ids and pixels instead of a processor's; returns the processor to hand in."""
    vlm, arrays = released
    ids: list[int] = []
    for token in arrays["prompt_ids"][0].tolist():
        ids += [vlm.config.image_token_id] * len(arrays["image_feature"]) if token < 0 else [token]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": arrays["pixel_values"]}
    monkeypatch.setattr(llava, "prompt_inputs", lambda *_: [inputs])
    monkeypatch.setattr(llava, "answer_ids", lambda *_: arrays["generated_ids"].tolist())
    return SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))


def test_embeddings_are_the_releases(released: tuple[Any, dict[str, torch.Tensor]], released_inputs: Any) -> None:
    vlm, arrays = released
    enhancement = llava.embed(vlm, released_inputs, [None], [""], [""])[0]
    assert torch.allclose(enhancement.image_embeds, arrays["image_feature"], rtol=0, atol=1e-5)
    assert torch.allclose(enhancement.text_embeds, arrays["text_feature"], rtol=0, atol=1e-5)


def test_the_tuning_loss_is_the_releases(released: tuple[Any, dict[str, torch.Tensor]], released_inputs: Any) -> None:
    vlm, arrays = released
    batch = llava.training_batch(released_inputs, [None], [""], [""])
    logits = vlm(**batch).logits[:, :-1, :-1]  # without the image token, which the release's vocabulary lacks
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(arrays["tuning_loss"].item(), abs=1e-5)
