"""The embedding cache: what is found again, what two writers and a kill leave behind."""

import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from lego_pipeline.data import embedding_cache
from lego_pipeline.data.embedding_cache import EmbeddingCache, frame_key, text_key, vlm_key
from lego_pipeline.vlm.base import Enhancement


def enhancement(number: int, tokens: int = 3) -> Enhancement:
    generator = torch.Generator().manual_seed(number)
    image, text = torch.randn(4, 6, generator=generator), torch.randn(tokens, 6, generator=generator)
    return Enhancement(f"description {number}", image, text)


def assert_found(cache: EmbeddingCache, number: int) -> None:
    """The cache has the entries frame-N and text-N as they were made."""
    found, made = cache.enhancement(f"frame-{number}", f"text-{number}"), enhancement(number)
    assert found.description == made.description
    assert torch.equal(found.image_embeds, made.image_embeds.half())
    assert torch.equal(found.text_embeds, made.text_embeds.half())


def filled(folder: Path, *numbers: int, **settings: Any) -> EmbeddingCache:
    cache = EmbeddingCache(folder, **settings)
    for number in numbers:
        cache.add(f"frame-{number}", f"text-{number}", enhancement(number))
    return cache


def test_entries_are_found_before_they_are_written(tmp_path: Path) -> None:
    assert_found(filled(tmp_path, 0), 0)


def test_entries_are_found_by_the_next_process(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1).write()
    cache = EmbeddingCache(tmp_path)
    assert len(cache) == 4
    assert_found(cache, 0)
    assert_found(cache, 1)


def test_entries_are_found_after_writing_by_the_writer(tmp_path: Path) -> None:
    cache = filled(tmp_path, 0)
    cache.write()
    assert_found(cache, 0)
    assert len(cache) == 2


def test_a_frames_embeddings_are_kept_once_for_all_its_actions(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    for number in range(3):
        cache.add("frame", f"text-{number}", enhancement(number))
    assert len(cache) == 4
    assert torch.equal(cache.tensor("frame"), enhancement(0).image_embeds.half())


def test_full_shards_are_written_at_once(tmp_path: Path) -> None:
    cache = filled(tmp_path, 0, 1, 2, shard_size=4)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert len(EmbeddingCache(tmp_path)) == 4
    cache.write()
    assert len(EmbeddingCache(tmp_path)) == 6


def test_writing_nothing_leaves_no_file(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).write()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_the_files_of_a_shard_costs_that_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 0).write()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding_cache.pq, "write_table", kill)
        filled(tmp_path, 1).write()
    cache = EmbeddingCache(tmp_path)
    assert_found(cache, 0)
    assert "text-1" not in cache
    filled(tmp_path, 1).write()
    assert_found(EmbeddingCache(tmp_path), 1)


def test_a_kill_while_a_file_is_written_leaves_the_cache_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 0).write()

    def write_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half a file")
        kill()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding_cache, "save_file", write_half)
        filled(tmp_path, 1).write()
    cache = EmbeddingCache(tmp_path)
    assert len(cache) == 2
    assert_found(cache, 0)


@pytest.mark.parametrize("prefixes", [("0", "1"), ("0", "0"), ("1", "10")])
def test_two_writers_at_once_keep_each_others_entries(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    first, second = (EmbeddingCache(tmp_path, prefix) for prefix in prefixes)
    first.add("frame-0", "text-0", enhancement(0))
    second.add("frame-1", "text-1", enhancement(1))
    interleave_writes(first, second)
    for number in (0, 1):
        assert_found(EmbeddingCache(tmp_path), number)


def test_a_reader_takes_up_new_shards_when_asked(tmp_path: Path) -> None:
    reader = EmbeddingCache(tmp_path)
    filled(tmp_path, 0).write()
    assert "text-0" not in reader
    reader.refresh()
    assert_found(reader, 0)


def test_a_missing_entry_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no entry text-0 in .*train/cache_embeddings.py"):
        EmbeddingCache(tmp_path).tensor("text-0")


def test_tensors_are_stored_in_the_asked_dtype(tmp_path: Path) -> None:
    filled(tmp_path, 0, dtype=torch.float32).write()
    assert torch.equal(EmbeddingCache(tmp_path).tensor("text-0"), enhancement(0).text_embeds)


def test_a_slice_of_a_batch_is_stored_without_the_batch(tmp_path: Path) -> None:
    batch = torch.randn(512, 4, 6)
    cache = EmbeddingCache(tmp_path)
    cache.add("frame", "text", Enhancement("", batch[0], batch[1]))
    assert cache.tensor("frame").untyped_storage().nbytes() == 4 * 6 * 2
    cache.write()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1000


def test_a_frame_is_known_by_its_pixels(frame: PIL.Image.Image, tmp_path: Path) -> None:
    frame.save(tmp_path / "frame.png")
    changed = frame.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    key = frame_key(frame, "vlm")
    assert frame_key(PIL.Image.open(tmp_path / "frame.png"), "vlm") == key
    assert frame_key(changed, "vlm") != key
    assert frame_key(frame, "another") != key


def test_frames_of_equal_bytes_and_other_shape_differ() -> None:
    wide, high = PIL.Image.new("RGB", (8, 4)), PIL.Image.new("RGB", (4, 8))
    assert frame_key(wide, "vlm") != frame_key(high, "vlm")


def test_a_description_is_known_by_how_it_came_about() -> None:
    keys = {
        text_key("frame", "question", seed=0, temperature=0.2),
        text_key("frame", "question", seed=1, temperature=0.2),
        text_key("frame", "question", seed=0, temperature=0.3),
        text_key("frame", "other", seed=0, temperature=0.2),
        text_key("other", "question", seed=0, temperature=0.2),
        text_key("frame", "question", given="text"),
    }
    assert len(keys) == 6
    assert text_key("frame", "question", temperature=0.2, seed=0) in keys


def test_a_vlm_is_known_by_its_weights_wherever_it_lies(tiny_components: dict[str, Any], tmp_path: Path) -> None:
    vlm = tiny_components["vlm"]
    vlm.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (type(vlm).from_pretrained(tmp_path / name) for name in ("here", "there"))
    key = vlm_key(here)
    assert vlm_key(there) == key
    with torch.no_grad():
        there.lm_head.weight[0, 0] += 1
    assert vlm_key(there) != key


def kill(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def interleave_writes(first: EmbeddingCache, second: EmbeddingCache) -> None:
    """Both writers count the shards before either has finished its own."""
    original = embedding_cache.save_file

    def save_second_in_between(tensors: dict[str, torch.Tensor], path: Path) -> None:
        embedding_cache.save_file = original
        second.write()
        original(tensors, path)

    embedding_cache.save_file = save_second_in_between
    try:
        first.write()
    finally:
        embedding_cache.save_file = original
