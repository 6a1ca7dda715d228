"""Tuning of any family: what is trained, in which precision, and on what loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_bitsandbytes_available

from lego_pipeline.vlm import VLM_FAMILIES, tuning

ADAPTERS = {"rank": 2, "alpha": 4, "dropout": 0.0, "seed": 0}
TEXTS = (["Why?", "How is it opened?"], ["It is open.", "x"])


@pytest.fixture(params=["llava", "qwen3_vl"])
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def parts(model_type: str, tiny_components: dict[str, Any], tiny_qwen_vlm: tuple[Any, Any]) -> tuple[Any, Any]:
    """A fresh VLM and its processor."""
    vlm, processor = {
        "llava": (tiny_components["vlm"], tiny_components["vlm_processor"]),
        "qwen3_vl": tiny_qwen_vlm,
    }[model_type]
    return copy.deepcopy(vlm), processor


@pytest.fixture
def batch(model_type: str, parts: tuple[Any, Any], make_frame: Any) -> dict[str, torch.Tensor]:
    frames = [make_frame(32, 32, seed=0), make_frame(48, 20, seed=1)]
    return VLM_FAMILIES[model_type].training_batch(parts[1], frames, *TEXTS)


@torch.no_grad()
def test_the_loss_is_the_models_own_summed_over_the_answers(
    parts: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    vlm, processor = parts
    loss, count = tuning.answer_loss(vlm, batch, vlm.device), tuning.count_tokens([batch])
    answers = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS[1]]
    assert count == sum(len(answer) + 1 for answer in answers)
    assert loss.item() / count == pytest.approx(vlm(**batch).loss.item(), rel=1e-5)


def test_logits_are_made_for_the_answers_alone(parts: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    vlm, _ = parts
    lengths: list[int] = []
    vlm.lm_head.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    tuning.answer_loss(vlm, batch, vlm.device)
    counted = (batch["labels"] != -100).any(0)
    assert lengths == [int(counted.shape[0] - counted.nonzero()[0]) + 1]


def test_the_vision_side_is_frozen_and_without_dropout(parts: tuple[Any, Any], model_type: str) -> None:
    vlm = tuning.train_whole(parts[0])
    tuning.set_training(vlm)
    family = VLM_FAMILIES[model_type]
    trained = {id(p) for part in family.language_modules(vlm) for p in part.parameters()}
    assert {id(p) for p in tuning.trained_parameters(vlm)} == trained
    still = {id(module) for part in family.vision_modules(vlm) for module in part.modules()}
    assert {id(module) for module in vlm.modules() if not module.training} == still


def test_adapters_are_on_all_linear_layers_of_the_language_model(parts: tuple[Any, Any], model_type: str) -> None:
    vlm = tuning.train_adapters(parts[0], **ADAPTERS)
    trained = [name for name, p in vlm.named_parameters() if p.requires_grad]
    low_rank = [name for name in trained if "lora_" in name]
    layers = vlm.get_base_model().config.text_config.num_hidden_layers
    assert len(low_rank) == layers * 7 * 2
    assert all(".language_model." in name for name in low_rank)
    names = VLM_FAMILIES[model_type].connector_names(parts[0])
    assert all(any(name in other for name in names) for other in trained if other not in low_rank)
    assert len(trained) > len(low_rank)


def test_every_trained_weight_gets_a_gradient_through_checkpoints(
    parts: tuple[Any, Any], batch: dict[str, torch.Tensor]
) -> None:
    vlm = tuning.train_adapters(parts[0], **ADAPTERS)
    tuning.checkpoint_activations(vlm)
    tuning.set_training(vlm)
    tuning.answer_loss(vlm, batch, torch.device("cpu")).backward()
    with_gradient = {name for name, p in vlm.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in vlm.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_fresh_adapters_leave_the_answers_alone(parts: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    before = parts[0](**batch).logits
    assert torch.equal(tuning.train_adapters(parts[0], **ADAPTERS)(**batch).logits, before)


def test_trained_weights_are_float32_whatever_the_others_are(parts: tuple[Any, Any]) -> None:
    vlm = tuning.train_adapters(parts[0].to(torch.bfloat16), **ADAPTERS)
    assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in vlm.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_seeds_of_adapters_leave_the_global_generator_alone(parts: tuple[Any, Any]) -> None:
    other, state = copy.deepcopy(parts[0]), torch.get_rng_state()
    vlm = tuning.train_adapters(parts[0], **ADAPTERS)
    assert torch.equal(torch.get_rng_state(), state)
    again = tuning.train_adapters(other, **ADAPTERS)
    pairs = zip(tuning.trained_parameters(vlm), tuning.trained_parameters(again), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes (extra `quantization`) is not installed")
def test_4_bits_are_for_the_language_models_linear_layers(parts: tuple[Any, Any], tmp_path: Path) -> None:
    parts[0].save_pretrained(tmp_path)
    vlm = tuning.load_in_4_bits(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    small = {name for name, module in vlm.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(small) == 7 * vlm.config.text_config.num_hidden_layers
    assert all("language_model" in name for name in small)
