"""The embedding cache: precision and size of what is kept, recipes, and finding without the VLM."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe, restored, sampling_seed, stored
from lego_pipeline.data.shards import pixel_key
from lego_pipeline.enhance import fill_cache, make_recipe
from lego_pipeline.vlm import VLM_FAMILIES

MB = 1_000_000
FULL = {"num_image_tokens": 256, "vision_dim": 1024, "num_states": 77, "dim": 5120}  # released sizes
LARGEST_MB = {"float16": (1.35, 0.80), "int8": (0.70, 0.41)}  # of the first action on a frame, of a further one


def recipe(**changes: Any) -> Recipe:
    keys = {"vlm_key": "vlm", "vision_key": "vision", "connector_key": "connector"}
    return Recipe(**{"family": "llava", **keys, "num_image_tokens": 4, "vlm_dim": 32, **changes})


@pytest.fixture
def filled(tiny_components: dict[str, Any], frame: PIL.Image.Image, tmp_path: Path) -> EmbeddingCache:
    """A cache on disk with one frame and two actions, one of them with a description of the manifest."""
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    cache = EmbeddingCache(tmp_path / "cache")
    for how, texts in ({"descriptions": "generate"}, None), ({"descriptions": "manifest"}, ["I open it."]):
        made = make_recipe(vlm, processor, max_new_tokens=4, **how)
        fill_cache(vlm, processor, cache, made, [frame], ["open drawer"], texts)
    cache.write()
    return cache


def only_recipe(cache: EmbeddingCache, descriptions: str) -> Recipe:
    return next(own for own in cache.recipes().values() if own.descriptions == descriptions)


# --- What is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 0.0), ("float16", 5e-4), ("int8", 4e-3)])
def test_states_come_back_within_the_precision_of_their_dtype(dtype: str, largest: float) -> None:
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [30], [1], [1]]
    )
    states[4] = 0
    error = (restored(stored(states, dtype)) - states).abs().amax(-1)
    assert (error <= largest * states.abs().amax(-1)).all()


def test_int8_rows_have_scales_of_their_own() -> None:
    kept = stored(torch.tensor([[1.0, -0.5], [100.0, 3.0]]), "int8")
    assert kept["states"].tolist() == [[127, -64], [127, 4]]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_states_that_are_not_finite_are_refused(dtype: str) -> None:
    value = 1e6 if dtype == "float16" else float("nan")
    with pytest.raises(ValueError, match=f"states must be finite numbers in {dtype}, got some up to"):
        stored(torch.tensor([[1.0, value]]), dtype)


@pytest.mark.parametrize("dtype", LARGEST_MB)
def test_sizes_on_disk_at_the_released_sizes(dtype: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cache, sizes = EmbeddingCache(tmp_path, dtype=dtype), []
    for action in range(2):
        if action == 0:
            cache.add_frame("frame", torch.randn(FULL["num_image_tokens"], FULL["vision_dim"], generator=generator))
        text_embeds = torch.randn(FULL["num_states"], FULL["dim"], generator=generator)
        cache.add_text(f"text-{action}", "My left hand opens the drawer. " * 6, text_embeds)
        cache.write()
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    first, further = sizes[0], sizes[1] - sizes[0]
    assert first / MB <= LARGEST_MB[dtype][0]
    assert further / MB <= LARGEST_MB[dtype][1]


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`dtype` of a cache must be one of float16, float32, int8, got 'int4'"):
        EmbeddingCache(tmp_path, dtype="int4")


def test_a_missing_entry_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for read in (EmbeddingCache.frame_states, EmbeddingCache.text_embeds, EmbeddingCache.description):
        with pytest.raises(KeyError, match="no entry key in .*train/cache_embeddings.py"):
            read(EmbeddingCache(tmp_path), "key")


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_a_frames_key_depends_on_pixels_and_vision_side_alone() -> None:
    key = recipe().frame_key("pixels")
    changes = {"vlm_key": "b", "connector_key": "b", "question_template": "{}?", "seed": 1, "top_k": 1}
    assert {recipe(**{name: value}).frame_key("pixels") for name, value in changes.items()} == {key}
    assert key not in (recipe().frame_key("others"), recipe(vision_key="b").frame_key("pixels"))


def test_a_sampled_texts_key_depends_on_all_that_it_comes_from() -> None:
    changes = {"vlm_key": "b", "question_template": "{}?", "seed": 1, "temperature": 0.3, "top_k": 1}
    keys = {recipe(**{name: value}).text_key("pixels", "open drawer") for name, value in changes.items()}
    keys |= {recipe(max_new_tokens=9).text_key("pixels", "open drawer"), recipe().text_key("pixels", "close drawer")}
    keys |= {recipe().text_key("pixels", "open drawer"), recipe().text_key("others", "open drawer")}
    assert len(keys) == 9
    assert recipe(vision_key="b", connector_key="b").text_key("pixels", "open drawer") in keys


def test_a_given_texts_key_does_not_depend_on_sampling() -> None:
    key = recipe().text_key("pixels", "open drawer", "I open it.")
    assert (
        recipe(seed=1, temperature=0.0, descriptions="manifest").text_key("pixels", "open drawer", "I open it.") == key
    )
    others = {recipe().text_key("pixels", "open drawer"), recipe().text_key("pixels", "open drawer", "I do.")}
    assert key not in others | {
        recipe().text_key("pixels", None, "I open it."),
        recipe().text_key("pixels", "I open it."),
    }


def test_the_seed_of_a_description_is_of_its_key_alone() -> None:
    keys = [recipe().text_key("pixels", action) for action in ("open drawer", "close drawer")]
    seeds = {sampling_seed(key) % 2**32 for key in keys}  # what torch's generator uses of them
    assert len(seeds) == 2


# --- Recipes and finding without the VLM -----------------------------------------------------------------------------


def test_a_reader_without_the_vlm_finds_a_frame_and_an_action(
    filled: EmbeddingCache, frame: PIL.Image.Image, make_frame: Callable[..., PIL.Image.Image]
) -> None:
    reader = EmbeddingCache(filled.folder)
    found = reader.lookup(frame, "open drawer", only_recipe(reader, "generate"))
    assert found is not None and found.image_embeds.shape == (4, 32) and found.text_embeds.shape[1] == 32
    assert reader.lookup(pixel_key(frame), "Open Drawer", only_recipe(reader, "generate")) is None
    assert reader.lookup(make_frame(32, 32, 1), "open drawer", only_recipe(reader, "generate")) is None


def test_given_descriptions_are_found_by_their_text(filled: EmbeddingCache, frame: PIL.Image.Image) -> None:
    own = only_recipe(filled, "manifest")
    found = filled.lookup(frame, "open drawer", own, "I open it.")
    assert found is not None and found.description == "I open it."
    assert filled.lookup(frame, "open drawer", own, "I close it.") is None
    with pytest.raises(ValueError, match="`description` must be given with recipe .*pass the row's description"):
        filled.lookup(frame, "open drawer", own)


def test_image_embeds_are_what_the_stored_projector_makes_of_the_stored_states(
    filled: EmbeddingCache, frame: PIL.Image.Image, tiny_components: dict[str, Any]
) -> None:
    reader, vlm = EmbeddingCache(filled.folder), tiny_components["vlm"]
    own = only_recipe(reader, "generate")
    frame_key, text_key = reader.keys(frame, "open drawer", own)
    states = reader.frame_states(frame_key)
    expected = VLM_FAMILIES["llava"].image_embeds(vlm.model.multi_modal_projector, states, 32)
    assert torch.equal(reader.enhancement(frame_key, text_key, own).image_embeds, expected)
    assert len(list(filled.folder.glob("connector-*.safetensors"))) == 1


def test_several_recipes_must_be_told_apart(filled: EmbeddingCache, frame: PIL.Image.Image) -> None:
    names = list(filled.recipes())
    with pytest.raises(ValueError, match="`recipe` must be one of those of .*, got None") as error:
        filled.lookup(frame, "open drawer")
    assert all(f"{name}: descriptions {filled.recipes()[name].descriptions}" in str(error.value) for name in names)
    with pytest.raises(ValueError, match="got nonsense"):
        filled.recipe("nonsense")
    assert [filled.recipe(name).name for name in names] == names
    assert EmbeddingCache(filled.folder, recipe=names[1]).recipe().name == names[1]


def test_an_empty_cache_has_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`cache` must hold entries and .*train/cache_embeddings.py"):
        EmbeddingCache(tmp_path).recipe()


def test_a_file_that_is_no_recipe_is_named(filled: EmbeddingCache) -> None:
    path = next(filled.folder.glob("recipe-*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(ValueError, match=f"{path.name} must be a recipe .*colour.*delete it"):
        filled.recipes()


def test_a_damaged_projector_is_named(filled: EmbeddingCache, frame: PIL.Image.Image) -> None:
    [path] = filled.folder.glob("connector-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    reader = EmbeddingCache(filled.folder)
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*delete it"):
        reader.connector(only_recipe(reader, "generate"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="`cache` must hold the VLM's projector"):
        reader.connector(only_recipe(reader, "generate"))


def test_a_pickled_cache_reads_the_same_entries(filled: EmbeddingCache, frame: PIL.Image.Image) -> None:
    own = only_recipe(filled, "generate")
    first, second = (cache.lookup(frame, "open drawer", own) for cache in (filled, pickle.loads(pickle.dumps(filled))))
    assert first is not None and second is not None and torch.equal(first.image_embeds, second.image_embeds)


def test_no_path_and_no_version_is_written(filled: EmbeddingCache, tmp_path: Path) -> None:
    for file in filled.folder.glob("recipe-*.json"):
        assert str(tmp_path) not in file.read_text() and "version" not in file.read_text()


def test_a_description_outlives_the_vlm_that_changes_later(
    filled: EmbeddingCache, frame: PIL.Image.Image, tiny_components: dict[str, Any]
) -> None:
    vlm, processor = copy.deepcopy(tiny_components["vlm"]), tiny_components["vlm_processor"]
    with torch.no_grad():
        vlm.lm_head.weight[0, 0] += 1
    changed = make_recipe(vlm, processor, max_new_tokens=4)
    assert filled.lookup(frame, "open drawer", changed) is None
    assert filled.lookup(frame, "open drawer", only_recipe(filled, "generate")) is not None
