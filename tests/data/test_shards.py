"""Shards: what is found again, what two writers, a kill and a damaged disk leave behind, and what keys depend on."""

import copy
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate import cpu_offload

from lego_pipeline.data import shards
from lego_pipeline.data.shards import ShardStore, content_key, model_key, pixel_key


def entry(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"a": torch.randn(2, 3, generator=generator), "b": torch.full((1,), number, dtype=torch.int8)}


def assert_found(store: ShardStore, *numbers: int) -> None:
    """The store has the entries as they were made."""
    for number in numbers:
        found, made = store.get(f"key-{number}"), entry(number)
        assert found.keys() == made.keys()
        assert all(torch.equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made)
        assert store.columns(f"key-{number}")["text"] == f"text {number}"


def filled(folder: Path, *numbers: int, **settings: Any) -> ShardStore:
    store = ShardStore(folder, **settings)
    for number in numbers:
        store.add(f"key-{number}", entry(number), text=f"text {number}")
    return store


def test_entries_are_found_before_and_after_they_are_written(tmp_path: Path) -> None:
    store = filled(tmp_path, 0, 1)
    assert_found(store, 0, 1)
    store.write()
    assert_found(store, 0, 1)
    assert_found(ShardStore(tmp_path), 0, 1)
    assert list(store) == ["key-0", "key-1"] and len(store) == 2 and "key-2" not in store


def test_what_is_there_is_not_added_again(tmp_path: Path) -> None:
    filled(tmp_path, 0).write()
    store = ShardStore(tmp_path)
    store.add("key-0", entry(1), text="other")
    store.write()
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert_found(store, 0)


def test_entries_of_one_shard_may_have_other_columns(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.add("key-0", entry(0), text="text 0")
    store.add("key-1", entry(1), number=3)
    store.write()
    assert ShardStore(tmp_path).columns("key-0") == {"text": "text 0", "number": None}


def test_full_shards_are_written_at_once(tmp_path: Path) -> None:
    store = filled(tmp_path, 0, 1, 2, shard_size=2)
    assert len(ShardStore(tmp_path)) == 2
    store.write()
    assert len(ShardStore(tmp_path)) == 3


def test_nothing_is_made_before_something_is_written(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "new")
    store.write()
    assert not (tmp_path / "new").exists()


def test_a_slice_of_a_batch_is_stored_without_the_batch(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.add("key", {"x": torch.randn(512, 4, 6)[0]})
    store.write()
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1000


def test_a_later_change_of_a_tensor_is_not_stored(tmp_path: Path) -> None:
    store, tensor = ShardStore(tmp_path), torch.zeros(3)
    store.add("key", {"x": tensor})
    tensor += 1
    assert torch.equal(store.get("key")["x"], torch.zeros(3))


def test_an_unknown_entry_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="there is no entry key-7 in"):
        ShardStore(tmp_path).get("key-7")


# --- Several processes -----------------------------------------------------------------------------------------------


def test_a_reader_takes_up_new_shards_when_asked(tmp_path: Path) -> None:
    reader = ShardStore(tmp_path)
    filled(tmp_path, 0).write()
    assert "key-0" not in reader
    reader.refresh()
    assert_found(reader, 0)


@pytest.mark.parametrize("prefixes", [("0", "1"), ("0", "0"), ("1", "10")])
def test_two_writers_at_once_keep_each_others_entries(
    tmp_path: Path, prefixes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = filled(tmp_path, 0, prefix=prefixes[0]), filled(tmp_path, 1, prefix=prefixes[1])
    original = shards.save_file

    def save_second_in_between(tensors: dict[str, torch.Tensor], path: Path) -> None:
        monkeypatch.setattr(shards, "save_file", original)
        second.write()
        original(tensors, path)

    monkeypatch.setattr(shards, "save_file", save_second_in_between)
    first.write()
    assert_found(ShardStore(tmp_path), 0, 1)


def test_a_pickled_store_reads_the_same_files(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    store.write()
    assert_found(store, 0)  # its files are open
    assert_found(pickle.loads(pickle.dumps(store)), 0)


def test_a_forked_worker_reads_an_opened_store(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    store.write()
    assert_found(store, 0)
    loader = torch.utils.data.DataLoader(_Entries(store), batch_size=None, num_workers=1)
    assert torch.equal(next(iter(loader)), entry(0)["a"])


class _Entries(torch.utils.data.Dataset):
    def __init__(self, store: ShardStore):
        self.store = store

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.get(f"key-{index}")["a"]


# --- Kills and damage ------------------------------------------------------------------------------------------------


def kill(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def write_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"half a file")
    kill()


@pytest.mark.parametrize(
    ("module", "name", "function"), [(shards.pq, "write_table", kill), (shards, "save_file", write_half)]
)
def test_a_kill_while_a_shard_is_written_costs_that_shard_alone(
    module: Any, name: str, function: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 0).write()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, function)
        filled(tmp_path, 1).write()
    store = ShardStore(tmp_path)
    assert_found(store, 0)
    assert "key-1" not in store
    filled(tmp_path, 1).write()
    assert_found(ShardStore(tmp_path), 0, 1)


def shard_of(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_shard_that_is_not_whole_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    filled(tmp_path, 0).write()
    path = shard_of(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        path.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"the shard .*{path.name} .* is damaged .*delete it and its .*\.parquet"):
        ShardStore(tmp_path)


def test_a_changed_byte_is_noticed_on_reading(tmp_path: Path) -> None:
    filled(tmp_path, 0).write()
    path = shard_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    store = ShardStore(tmp_path)
    with pytest.raises(ValueError, match=rf"{path.name} .* is damaged \(the checksum of an entry is wrong\)"):
        store.get("key-0")


def test_a_deleted_shard_is_filled_again(tmp_path: Path) -> None:
    filled(tmp_path, 0).write()
    filled(tmp_path, 1).write()
    for file in tmp_path.glob("0-000000-*"):
        file.unlink()
    store = filled(tmp_path, 0)
    store.write()
    assert_found(ShardStore(tmp_path), 0, 1)


def test_a_full_disk_is_told_and_leaves_what_was_written(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    store.write()
    store.add("large", {"x": torch.zeros(100_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"the shard .* could not be written .*free some space"):
            store.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(ShardStore(tmp_path)) == ["key-0"]
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]
    store.write()  # after space was made
    assert list(ShardStore(tmp_path)) == ["key-0", "large"]


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_a_frame_is_known_by_its_pixels(frame: PIL.Image.Image, tmp_path: Path) -> None:
    frame.save(tmp_path / "frame.png")
    changed = frame.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert pixel_key(PIL.Image.open(tmp_path / "frame.png")) == pixel_key(frame) != pixel_key(changed)


def test_frames_of_equal_bytes_and_other_shape_differ() -> None:
    assert pixel_key(PIL.Image.new("RGB", (8, 4))) != pixel_key(PIL.Image.new("RGB", (4, 8)))


def test_a_turned_frame_is_known_by_what_is_seen(frame: PIL.Image.Image, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # to be shown turned by 180 degrees
    frame.rotate(180).save(tmp_path / "frame.png", exif=exif)
    assert pixel_key(PIL.Image.open(tmp_path / "frame.png")) == pixel_key(frame)


def test_the_order_of_named_facts_does_not_matter() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1}) != content_key({"a": 2, "b": 1})


def test_a_model_is_known_by_its_weights_and_further_facts() -> None:
    model = torch.nn.Linear(3, 2)
    same = copy.deepcopy(model)
    key = model_key(model)
    assert model_key(same) == key
    assert model_key(model, "fact") != key
    assert model_key([model, same]) != key
    with torch.no_grad():
        same.bias[1] += 1
    assert model_key(same) != key


def test_a_models_key_does_not_depend_on_the_dtype_that_holds_its_weights() -> None:
    half = torch.nn.Linear(3, 2).half()
    assert model_key(copy.deepcopy(half).float()) == model_key(half)
    assert model_key(copy.deepcopy(half).bfloat16()) != model_key(half)  # which rounds them


def test_offloaded_weights_give_the_same_key() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    key = model_key(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert model_key(model) == key
