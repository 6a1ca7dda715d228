"""Enhancing with a cache: which work of the VLM is done, and that the answers are the same in any case."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate import cpu_offload

from lego_pipeline import LegoPipeline, enhance
from lego_pipeline.data import embedding_cache
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.enhance import fill_cache, make_recipe, vlm_id
from lego_pipeline.vlm import VLM_FAMILIES, Enhancement, family_of

SETTINGS = {"question_template": "How to {} here?", "max_new_tokens": 4, "temperature": 0.7, "top_k": 20}


@pytest.fixture(params=["llava", "qwen3_vl"])
def vlm(request: pytest.FixtureRequest, tiny_components: dict[str, Any], tiny_qwen_vlm: Any) -> tuple[Any, Any]:
    """Model and processor of a family."""
    llava = tiny_components["vlm"], tiny_components["vlm_processor"]
    return llava if request.param == "llava" else tiny_qwen_vlm


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the frames that the vision side sees and the rows that the language side generates and embeds."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(vlm: Any, processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += len(images)
            return function(vlm, processor, images, *args, **kwargs)

        return call

    for family in VLM_FAMILIES.values():
        for name in ("frame_states", "generate", "embed"):
            monkeypatch.setattr(family, name, counted(name, getattr(family, name)))
    return counts


def ask(vlm: tuple[Any, Any], cache: EmbeddingCache | None, frames: Any, actions: Any, **changes: Any) -> Any:
    return enhance.enhance(*vlm, frames, actions, cache=cache, **{**SETTINGS, **changes})


def assert_equal(first: list[Enhancement], second: list[Enhancement]) -> None:
    """Both hold the same, bit for bit."""
    for a, b in zip(first, second, strict=True):
        assert a.description == b.description
        assert torch.equal(a.image_embeds, b.image_embeds) and torch.equal(a.text_embeds, b.text_embeds)


def test_the_second_time_there_is_no_work_of_the_vlm(
    vlm: tuple[Any, Any], make_frame: Callable[..., PIL.Image.Image], tmp_path: Path, work: Counter[str]
) -> None:
    frames, actions = [make_frame(32, 32, seed) for seed in (0, 1)], ["open drawer", "take cup"]
    first = ask(vlm, EmbeddingCache(tmp_path), frames, actions)
    assert work == {"frame_states": 2, "generate": 2, "embed": 2}
    assert_equal(ask(vlm, EmbeddingCache(tmp_path), frames, actions), first)
    assert work == {"frame_states": 2, "generate": 2, "embed": 2}


def test_a_second_action_on_a_frame_does_no_vision_work(
    vlm: tuple[Any, Any], frame: PIL.Image.Image, tmp_path: Path, work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"])
    for module in family_of(vlm[0]).vision_modules(vlm[0]):
        monkeypatch.setattr(module, "forward", lambda *_, **__: pytest.fail("the vision side was called"))
    ask(vlm, EmbeddingCache(tmp_path), [frame, frame], ["take cup", "close drawer"])
    assert work == {"frame_states": 1, "generate": 3, "embed": 3}


def test_one_frame_in_a_batch_is_seen_once(
    vlm: tuple[Any, Any], frame: PIL.Image.Image, tmp_path: Path, work: Counter[str]
) -> None:
    ask(vlm, EmbeddingCache(tmp_path), [frame] * 3, ["open drawer", "take cup", "open drawer"])
    assert work == {"frame_states": 1, "generate": 2, "embed": 2}


@pytest.mark.parametrize(
    ("change", "added"),
    [
        ({"temperature": 0.5}, {"generate": 1, "embed": 1}),
        ({"top_k": 5}, {"generate": 1, "embed": 1}),
        ({"max_new_tokens": 3}, {"generate": 1, "embed": 1}),
        ({"question_template": "{}?"}, {"generate": 1, "embed": 1}),
        ({"descriptions": ["I open it."]}, {"embed": 1}),
        ({"frames": True}, {"frame_states": 1, "generate": 1, "embed": 1}),
    ],
)
def test_what_is_asked_otherwise_is_a_miss(
    change: dict[str, Any],
    added: dict[str, int],
    tiny_components: dict[str, Any],
    make_frame: Callable[..., PIL.Image.Image],
    tmp_path: Path,
    work: Counter[str],
) -> None:
    vlm = tiny_components["vlm"], tiny_components["vlm_processor"]
    frame, change = make_frame(32, 32), dict(change)
    ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"])
    work.clear()
    if change.pop("frames", False):
        frame.putpixel((3, 3), (1, 2, 3))
    ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"], **change)
    assert work == added


@pytest.mark.parametrize(
    ("part", "added"),
    [
        ("lm_head", {"generate": 1, "embed": 1}),
        ("model.multi_modal_projector.linear_2", {"generate": 1, "embed": 1}),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", {"frame_states": 1, "generate": 1, "embed": 1}),
    ],
)
def test_changed_weights_are_a_miss_in_one_object_too(
    part: str,
    added: dict[str, int],
    tiny_components: dict[str, Any],
    frame: PIL.Image.Image,
    tmp_path: Path,
    work: Counter[str],
) -> None:
    vlm = copy.deepcopy(tiny_components["vlm"]), tiny_components["vlm_processor"]
    ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"])
    work.clear()
    with torch.no_grad():
        vlm[0].get_submodule(part).weight[1, 1] += 0.5
    ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"])
    assert work == added


def test_the_first_answer_is_the_one_that_is_stored(
    vlm: tuple[Any, Any], frame: PIL.Image.Image, tmp_path: Path
) -> None:
    """In the coarsest precision: what is read of a frame is what is on disk, when it is new too."""
    first = ask(vlm, EmbeddingCache(tmp_path / "one", dtype="int8"), [frame], ["open drawer"])
    fill = EmbeddingCache(tmp_path / "two", dtype="int8")
    ask(vlm, fill, [frame], ["take cup"])
    assert_equal(ask(vlm, EmbeddingCache(tmp_path / "two", dtype="int8"), [frame], ["open drawer"]), first)


def test_a_cached_answer_is_close_to_the_one_without_a_cache(
    vlm: tuple[Any, Any], frame: PIL.Image.Image, tmp_path: Path
) -> None:
    [cached] = ask(vlm, EmbeddingCache(tmp_path), [frame], ["open drawer"])
    with torch.no_grad():
        [plain] = ask(vlm, None, [frame], ["open drawer"], descriptions=[cached.description])
    torch.testing.assert_close(cached.image_embeds, plain.image_embeds, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(cached.text_embeds, plain.text_embeds, atol=2e-2, rtol=2e-3)


def test_answers_do_not_depend_on_the_batch(
    vlm: tuple[Any, Any], make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
) -> None:
    frames = [make_frame(32, 32, seed) for seed in range(3)]
    together = ask(vlm, EmbeddingCache(tmp_path / "a"), frames, ["open drawer"] * 3)
    alone = [ask(vlm, EmbeddingCache(tmp_path / "b"), [frame], ["open drawer"])[0] for frame in frames]
    assert [item.description for item in together] == [item.description for item in alone]
    assert len({item.description for item in together}) == 3


# --- Recipes ---------------------------------------------------------------------------------------------------------


def test_a_vlm_is_known_by_its_content_wherever_it_lies(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = vlm
    recipe = make_recipe(model, processor)
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        processor.save_pretrained(tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number), dtype=torch.float32)
        assert make_recipe(again, type(processor).from_pretrained(tmp_path / str(number))) == recipe


def test_a_recipe_does_not_depend_on_dtype_device_map_or_library_version(
    tiny_components: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = copy.deepcopy(tiny_components["vlm"]).half(), tiny_components["vlm_processor"]
    recipe = make_recipe(model, processor)
    model.config.transformers_version = "99.0"
    assert make_recipe(model, processor) == recipe
    assert make_recipe(model.float(), processor) == recipe
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert make_recipe(model, processor) == recipe


@pytest.mark.parametrize("what", ["template", "image size", "token", "generation"])
def test_other_settings_are_another_vlm(what: str, tiny_components: dict[str, Any]) -> None:
    model, processor = copy.deepcopy(tiny_components["vlm"]), copy.deepcopy(tiny_components["vlm_processor"])
    before = make_recipe(model, processor)
    if what == "template":
        processor.chat_template += " "
    elif what == "image size":
        processor.image_processor.image_mean = (0.0, 0.0, 0.0)
    elif what == "token":
        processor.tokenizer.add_tokens(["drawer"])
    else:
        model.generation_config.repetition_penalty = 2.0
    after = make_recipe(model, processor)
    assert after.vlm_key != before.vlm_key
    assert (after.vision_key != before.vision_key) == (what == "image size")


def test_a_vlm_has_one_id_in_every_format_that_does_not_change_what_it_is(tiny_components: dict[str, Any]) -> None:
    model, processor = copy.deepcopy(tiny_components["vlm"]), tiny_components["vlm_processor"]
    own = vlm_id(model, processor)
    assert own == vlm_id(copy.deepcopy(model), processor) == vlm_id(copy.deepcopy(model).bfloat16(), processor)
    assert vlm_id(copy.deepcopy(model).half(), processor) is None  # rounds otherwise
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.5
    assert own != vlm_id(model, processor) is not None


def test_a_vlm_with_an_adapter_of_its_own_has_no_id(tiny_components: dict[str, Any]) -> None:
    """Merged into the weights, as it is exported, it changes them by rounding."""
    from peft import LoraConfig, get_peft_model

    targets = family_of(tiny_components["vlm"]).LORA_TARGETS
    adapted = get_peft_model(copy.deepcopy(tiny_components["vlm"]), LoraConfig(r=2, target_modules=targets))
    assert vlm_id(adapted, tiny_components["vlm_processor"]) is None


def test_a_cache_s_name_and_entries_do_not_depend_on_the_id(tiny_components: dict[str, Any]) -> None:
    """Caches that were filled before there were ids are read on."""
    recipe = make_recipe(tiny_components["vlm"], tiny_components["vlm_processor"])
    old = dataclasses.replace(recipe, vlm_id=None)
    assert recipe.vlm_id is not None and old == recipe and old.name == recipe.name
    assert old.text_key("pixels", "open drawer") == recipe.text_key("pixels", "open drawer")


def test_an_adapter_makes_another_vlm_of_the_same_vision_side(tiny_components: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    processor = tiny_components["vlm_processor"]
    before = make_recipe(tiny_components["vlm"], processor)
    adapted = [
        get_peft_model(
            copy.deepcopy(tiny_components["vlm"]),
            LoraConfig(r=2, lora_alpha=alpha, target_modules=family_of(tiny_components["vlm"]).LORA_TARGETS),
        )
        for alpha in (2, 4)
    ]
    with torch.no_grad():
        for model in adapted:
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.fill_(0.1)
    recipes = [make_recipe(model, processor) for model in adapted]
    assert len({before.vlm_key, *(recipe.vlm_key for recipe in recipes)}) == 3
    assert {before.vision_key, *(recipe.vision_key for recipe in recipes)} == {before.vision_key}


def test_weights_are_hashed_once(tiny_components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = copy.deepcopy(tiny_components["vlm"]), tiny_components["vlm_processor"]
    recipe = make_recipe(model, processor)
    monkeypatch.setattr(enhance, "model_key", lambda *_, **__: pytest.fail("weights are hashed again"))
    assert make_recipe(model, processor) == recipe


# --- The pipeline ----------------------------------------------------------------------------------------------------


def test_the_pipeline_reads_what_the_script_wrote(
    tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, tmp_path: Path, work: Counter[str]
) -> None:
    config = tiny_pipeline.config
    settings = {name: config[name] for name in ("question_template", "max_new_tokens", "temperature", "top_k")}
    recipe = make_recipe(tiny_pipeline.vlm, tiny_pipeline.vlm_processor, **settings)
    cache = EmbeddingCache(tmp_path)
    fill_cache(tiny_pipeline.vlm, tiny_pipeline.vlm_processor, cache, recipe, [frame], ["open drawer"])
    cache.write()
    work.clear()
    [found] = tiny_pipeline.enhance(frame, "open drawer", cache=tmp_path)
    result = tiny_pipeline(frame, action="open drawer", num_inference_steps=1, cache=str(tmp_path))
    assert result.descriptions == [found.description]
    assert not work


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cached_description_does_not_depend_on_the_generator(
    seed: int, tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    tiny_pipeline.register_to_config(temperature=5.0, top_k=0)
    expected = tiny_pipeline.enhance(frame, "open drawer", cache=tmp_path / "a")
    generator = torch.Generator().manual_seed(seed)
    assert_equal(tiny_pipeline.enhance(frame, "open drawer", generator=generator, cache=tmp_path / "b"), expected)


def test_without_a_vlm_the_cache_stands_in_for_it(
    tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return tiny_pipeline(
            frame, "open drawer", num_inference_steps=1, generator=generator, output_type="np", cache=tmp_path
        )

    expected = draw()
    tiny_pipeline.register_modules(vlm=None, vlm_processor=None)
    result = draw()
    assert result.descriptions == expected.descriptions
    assert (result.images == expected.images).all()
    with pytest.raises(
        ValueError, match="`cache` must hold the frame with the action 'take cup' where there is no VLM"
    ):
        tiny_pipeline(frame, "take cup", num_inference_steps=1, cache=tmp_path)


def test_an_enhancement_of_another_vlm_of_the_same_sizes_is_refused(
    tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    """From a cache or a file; one of an unknown VLM is taken, and so is any where the checkpoint knows none."""
    [unknown] = tiny_pipeline.enhance(frame, "open drawer")
    [item] = tiny_pipeline.enhance(frame, "open drawer", cache=tmp_path / "cache")
    item.save(tmp_path / "item.safetensors")
    loaded = Enhancement.load(tmp_path / "item.safetensors").to("cpu", torch.float32)
    assert loaded.vlm_id == item.vlm_id == vlm_id(tiny_pipeline.vlm, tiny_pipeline.vlm_processor)
    for known in (None, item.vlm_id):
        tiny_pipeline.projector.register_to_config(vlm_id=known)
        tiny_pipeline.encode_condition([unknown, loaded])
    tiny_pipeline.projector.register_to_config(vlm_id="0" * 32)
    tiny_pipeline.encode_condition(unknown)
    for given in ({"enhancement": loaded}, {"action": "open drawer", "cache": tmp_path / "cache"}):
        with pytest.raises(ValueError, match="`enhancement` must be of the VLM that this checkpoint was trained with"):
            tiny_pipeline(frame, num_inference_steps=1, **given)


def test_keys_are_computed_in_one_place(tiny_pipeline: LegoPipeline, frame: PIL.Image.Image, tmp_path: Path) -> None:
    """A picture of another mode, size in memory or type gives the frame's own entry."""
    tiny_pipeline.enhance(frame.convert("RGBA"), "open drawer", cache=tmp_path)
    cache = embedding_cache.EmbeddingCache(tmp_path)
    assert cache.lookup(frame, "open drawer") is not None
