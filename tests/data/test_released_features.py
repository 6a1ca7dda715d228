"""Released VLM features as an embedding cache: shapes, precision, going on, and files that are not what they say."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline.data.embedding_cache import EmbeddingCache, imported_recipe
from lego_pipeline.data.released.features import find_recipe, import_features, read_image_features, read_text_features
from lego_pipeline.data.released.pairs import Pair
from lego_pipeline.images import read_image

ROWS, DIM = 9, 48


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.fixture
def pairs(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]) -> list[Pair]:
    """Two pairs with their files; the texts have 5 and 90 states."""
    found = []
    for i, length in enumerate((5, 90)):
        files = {"start frames": f"{i}.jpg", "image features": f"image-{i}.npy", "text features": f"text-{i}.npy"}
        files = {kind: tmp_path / name for kind, name in files.items()}
        make_frame(32, 24, i).save(files["start frames"])
        np.save(files["image features"], array(ROWS, DIM, seed=i))
        np.save(files["text features"], array(length, DIM, seed=10 + i))
        found.append(Pair({"action": "open drawer", "description": f"In way {i}."}, files))
    return found


def test_features_are_found_by_frame_label_and_description(pairs: list[Pair], tmp_path: Path) -> None:
    recipe = find_recipe(pairs[0], "llava")
    assert (recipe.num_image_tokens, recipe.vlm_dim, recipe.descriptions) == (ROWS, DIM, "manifest")
    assert import_features(pairs, EmbeddingCache(tmp_path / "cache"), recipe) == 4
    cache = EmbeddingCache(tmp_path / "cache")
    for i, pair in enumerate(pairs):
        frame = read_image(pair.files["start frames"])
        found = cache.lookup(frame, "open drawer", description=f"In way {i}.")
        assert found is not None and found.description == f"In way {i}."
        assert torch.equal(found.image_embeds, torch.from_numpy(array(ROWS, DIM, seed=i)).float())
        assert torch.equal(found.text_embeds, torch.from_numpy(array([5, 90][i], DIM, seed=10 + i)).float())
        assert cache.lookup(frame, "open drawer", description="Another.") is None
        assert cache.lookup(frame, "close drawer", description=f"In way {i}.") is None


def test_what_is_there_is_not_read_again(pairs: list[Pair], tmp_path: Path) -> None:
    recipe = find_recipe(pairs[0], "llava")
    import_features(pairs[:1], EmbeddingCache(tmp_path / "cache"), recipe)
    for kind in ("image features", "text features"):
        pairs[0].files[kind].unlink()
    assert import_features(pairs, EmbeddingCache(tmp_path / "cache"), recipe) == 2


def test_another_vlm_makes_other_entries(pairs: list[Pair], tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    for source in ("a", "b"):
        assert import_features(pairs, cache, find_recipe(pairs[0], source)) == 4
    assert imported_recipe("a", ROWS, DIM).name != imported_recipe("b", ROWS, DIM).name


def test_what_was_read_before_a_bad_file_is_kept(pairs: list[Pair], tmp_path: Path) -> None:
    np.save(pairs[1].files["image features"], array(ROWS, DIM + 1))
    cache = EmbeddingCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"image-1.npy` must hold \(9, 48\) as the others do, got \(9, 49\)"):
        import_features(pairs, cache, find_recipe(pairs[0], "llava"))
    assert len(EmbeddingCache(tmp_path / "cache")) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float, pairs: list[Pair], tmp_path: Path) -> None:
    states = array(5, DIM)
    states[2, 3] = value
    np.save(pairs[0].files["text features"], states)
    with pytest.raises(ValueError, match=r"text-0.npy`: states must be finite"):
        import_features(pairs, EmbeddingCache(tmp_path / "cache"), find_recipe(pairs[0], "llava"))


def test_a_single_state_and_older_files_are_read_as_states(tmp_path: Path) -> None:
    for name, states in {"one": array(DIM), "older": array(4, 3, DIM), "plain": array(4, DIM)}.items():
        np.save(tmp_path / f"{name}.npy", states)
    assert read_text_features(tmp_path / "one.npy").shape == (1, DIM)
    assert torch.equal(read_text_features(tmp_path / "older.npy"), torch.from_numpy(array(4, 3, DIM)[:, -1]).float())
    assert read_text_features(tmp_path / "plain.npy").dtype == torch.float32


class Harm:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    np.save(tmp_path / "objects.npy", np.array([Harm(trace)], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Harm(trace)))
    np.savez(tmp_path / "zip.npz", array(2, 2))
    for name in ("objects.npy", "plain.npy", "zip.npz"):
        with pytest.raises(ValueError, match=f"{name}` must be an array of floats in NumPy's format"):
            read_image_features(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (array(3, 2, 4), r"must hold image features \(N_i, D\), got \(3, 2, 4\)"),
        (array(0, 4), r"got \(0, 4\)"),
        (np.ones((2, 2), dtype=np.int64), "must hold floats, got int64"),
    ],
)
def test_an_array_of_another_form_is_refused(states: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", states)
    with pytest.raises(ValueError, match=f"a.npy` {reason}" if reason.startswith("must") else reason):
        read_image_features(tmp_path / "a.npy")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array(4, 4))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a.npy` must be an array of floats .*; copy or extract it again"):
        read_image_features(tmp_path / "a.npy")
