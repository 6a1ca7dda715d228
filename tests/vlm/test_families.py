"""What every VLM family must do, on a tiny model of each: a frame in two stages, given states as found ones."""

import copy
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.projector import LegoProjector
from lego_pipeline.vlm import VLM_FAMILIES, family_of, tuning

QUESTIONS = ["How does one open the drawer?", "How does the person properly wash a plate?", "Why?"]
DESCRIPTIONS = ["She pulls.", "With the left hand, the person holds the plate.", "x"]
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}


@pytest.fixture(params=["llava", "qwen3_vl"])
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(model_type: str) -> Any:
    return VLM_FAMILIES[model_type]


@pytest.fixture
def parts(model_type: str, tiny_components: dict[str, Any], tiny_qwen_vlm: tuple[Any, Any]) -> tuple[Any, Any]:
    """VLM and processor."""
    llava = (tiny_components["vlm"], tiny_components["vlm_processor"])
    return {"llava": llava, "qwen3_vl": tiny_qwen_vlm}[model_type]


@pytest.fixture
def frames(make_frame: Callable[..., PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Three frames of different sizes."""
    return [make_frame(32, 32, seed=0), make_frame(48, 20, seed=1), make_frame(16, 40, seed=2)]


def test_a_family_is_found_by_the_model_type(family: Any, parts: Any) -> None:
    assert family_of(parts[0]) is family
    with pytest.raises(ValueError, match=r"known family \(llava, qwen3_vl\), got model type 'unknown'"):
        family_of(SimpleNamespace(config=SimpleNamespace(model_type="unknown")))


@torch.no_grad()
def test_given_frame_states_answer_without_a_call_of_the_vision_side(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = copy.deepcopy(parts[0]), parts[1]
    states = family.frame_states(vlm, processor, frames)
    described = family.generate(vlm, processor, frames, QUESTIONS, **GREEDY)
    embedded = family.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS)

    def called(*_: Any) -> None:
        raise AssertionError("the vision side is called")

    hooks = [part.register_forward_pre_hook(called) for part in family.vision_modules(vlm)]
    assert family.generate(vlm, processor, frames, QUESTIONS, **GREEDY, frame_states=states) == described
    again = family.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS, frame_states=states)
    for first, second in zip(embedded, again, strict=True):
        assert torch.equal(first.image_embeds, second.image_embeds)
        assert torch.equal(first.text_embeds, second.text_embeds)
    with pytest.raises(AssertionError, match="the vision side is called"):  # so the hooks do catch it
        family.frame_states(vlm, processor, frames)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_given_frame_states_are_what_the_language_model_reads(family: Any, parts: Any, frames: list) -> None:
    states = family.frame_states(*parts, frames)
    own = family.embed(*parts, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1])[0]
    other = family.embed(*parts, frames[:1], QUESTIONS[:1], DESCRIPTIONS[:1], frame_states=states[1:2])[0]
    assert not torch.allclose(own.text_embeds, other.text_embeds)


@torch.no_grad()
def test_the_connector_makes_the_image_embeds_of_frame_states(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = parts
    count, dim = family.sizes(vlm, processor)
    states = torch.stack(family.frame_states(vlm, processor, frames))
    embeds = family.image_embeds(family.connector(vlm), states, dim)
    assert embeds.shape == (3, count, dim)
    for enhancement, row in zip(family.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS), embeds, strict=True):
        assert torch.allclose(enhancement.image_embeds, row, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_connector_is_rebuilt_without_the_vlm(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = parts
    dim = family.sizes(vlm, processor)[1]
    rebuilt = family.build_connector(family.connector_settings(vlm))
    rebuilt.load_state_dict(family.connector(vlm).state_dict())
    states = family.frame_states(vlm, processor, frames)[0]
    expected = family.image_embeds(family.connector(vlm), states, dim)
    assert torch.equal(family.image_embeds(rebuilt, states, dim), expected)


def test_frame_states_depend_on_the_vision_modules_alone(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = copy.deepcopy(parts[0]), parts[1]
    before = family.frame_states(vlm, processor, frames[:1])[0]
    vision = {id(p) for part in family.vision_modules(vlm) for p in part.parameters()}
    for parameter in vlm.parameters():
        if id(parameter) not in vision:
            parameter.data.zero_()
    assert torch.equal(family.frame_states(vlm, processor, frames[:1])[0], before)
    for part in family.vision_modules(vlm):
        for parameter in part.parameters():
            parameter.data.mul_(1.1)
    assert not torch.equal(family.frame_states(vlm, processor, frames[:1])[0], before)


@torch.no_grad()
def test_frame_states_do_not_depend_on_the_batch(family: Any, parts: Any, frames: list) -> None:
    for frame, together in zip(frames, family.frame_states(*parts, frames), strict=True):
        assert torch.allclose(family.frame_states(*parts, [frame])[0], together, rtol=0, atol=2e-6)


def test_vision_and_language_modules_cover_the_vlm(family: Any, parts: Any) -> None:
    vlm, _ = parts
    modules = [*family.vision_modules(vlm), *family.language_modules(vlm)]
    assert {id(p) for part in modules for p in part.parameters()} == {id(p) for p in vlm.parameters()}


@torch.no_grad()
def test_a_vlm_wrapped_by_peft_is_read_with_its_adapter(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = copy.deepcopy(parts[0]), parts[1]
    plain = family.embed(vlm, processor, frames, QUESTIONS, DESCRIPTIONS)
    wrapped = get_peft_model(
        vlm, LoraConfig(r=2, target_modules=family.LORA_TARGETS, modules_to_save=family.connector_names(vlm))
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(0.05)
    wrapped.eval()
    assert family_of(wrapped) is family
    adapted = family.embed(wrapped, processor, frames, QUESTIONS, DESCRIPTIONS)
    states = torch.stack(family.frame_states(wrapped, processor, frames))
    connector = family.connector(wrapped)
    assert not any("modules_to_save" in name for name, _ in connector.named_parameters())
    rows = family.image_embeds(connector, states, family.sizes(wrapped, processor)[1])
    described = family.generate(wrapped, processor, frames, QUESTIONS, **GREEDY)
    for first, second, row in zip(plain, adapted, rows, strict=True):
        assert not torch.allclose(first.text_embeds, second.text_embeds, atol=1e-3)
        assert not torch.allclose(first.image_embeds, second.image_embeds, atol=1e-3)
        assert torch.allclose(second.image_embeds, row, rtol=0, atol=1e-6)
    merged = wrapped.merge_and_unload()
    assert family.generate(merged, processor, frames, QUESTIONS, **GREEDY) == described
    for first, second in zip(adapted, family.embed(merged, processor, frames, QUESTIONS, DESCRIPTIONS), strict=True):
        assert torch.allclose(first.text_embeds, second.text_embeds, rtol=0, atol=2e-5)


def test_labels_are_the_answer_and_its_end(family: Any, parts: Any, frames: list) -> None:
    _, processor = parts
    batch = family.training_batch(processor, frames, QUESTIONS, DESCRIPTIONS)
    for i, description in enumerate(DESCRIPTIONS):
        counted = batch["labels"][i] != -100
        expected = [*processor.tokenizer(description).input_ids, processor.tokenizer.eos_token_id]
        if processor.tokenizer.bos_token_id == expected[0]:
            expected = expected[1:]
        assert batch["labels"][i][counted].tolist() == batch["input_ids"][i][counted].tolist() == expected


@torch.no_grad()
def test_the_training_loss_does_not_depend_on_padding(family: Any, parts: Any, frames: list) -> None:
    vlm, processor = parts

    def total(indices: list[int]) -> float:
        arguments = ([source[i] for i in indices] for source in (frames, QUESTIONS, DESCRIPTIONS))
        batch = family.training_batch(processor, *arguments)
        return tuning.answer_loss(vlm, batch, vlm.device).item()

    assert total([0, 1, 2]) == pytest.approx(sum(total([i]) for i in range(3)), rel=1e-5)


def test_a_family_module_has_all_functions_of_the_protocol(family: ModuleType) -> None:
    from lego_pipeline.vlm.base import VlmFamily

    wanted = {name for name in vars(VlmFamily) if not name.startswith("_")}
    assert {name for name in wanted if not hasattr(family, name)} == set()


def test_a_pipeline_takes_the_family_and_comes_back_from_disk(
    family: Any, parts: Any, make_tiny_pipeline: Callable[..., LegoPipeline], frame: PIL.Image.Image, tmp_path: Any
) -> None:
    vlm, processor = parts
    count, dim = family.sizes(vlm, processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = LegoProjector(
            vlm_dim=dim, cross_attention_dim=32, num_image_tokens=count, num_text_tokens=6, num_heads=4,
            feed_forward_dim=48,
        )  # fmt: skip
    pipe = make_tiny_pipeline(vlm=vlm, vlm_processor=processor, projector=projector.eval())
    pipe.save_pretrained(tmp_path)
    again = LegoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    results = [
        one(frame, action="open drawer", generator=torch.Generator().manual_seed(0), output_type="pt")
        for one in (pipe, again)
    ]
    assert results[0].descriptions == results[1].descriptions
    assert torch.allclose(results[0].images, results[1].images, rtol=0, atol=1e-5)
