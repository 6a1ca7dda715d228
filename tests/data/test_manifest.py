"""The manifest: what is written comes back, what is wrong is named with file and row."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from lego_pipeline.data.manifest import FEATURES, read_manifest, write_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the datasets cache of these tests out of the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["memory", "disk"])
def either_way(request, monkeypatch):
    """Read as a small manifest, and as one that is too large for memory."""
    if request.param == "disk":
        monkeypatch.setattr("lego_pipeline.data.manifest.IN_MEMORY", 0)


def frame(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def pair(number: int, **changes) -> dict:
    return {
        "id": f"pair-{number}",
        "image_0": frame(number),
        "image_1": frame(number + 100),
        "action": "open drawer",
        "verb": "open",
        "noun": "drawer",
        "description": "With the left hand I pull the drawer open.",
        "slots": {"hand": "left"},
        "boxes_0": [],
        "boxes_1": [{"name": "hand_left", "x0": 0.25, "y0": 0.5, "x1": 0.75, "y1": 1.0}],
        "video": "v",
        "time_0": 0.0,
        "time_1": 1.0,
        "split": "train",
        "source": "test",
        "licence": "Apache-2.0",
        **changes,
    }


def write_parquet(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_a_written_pair_comes_back_with_the_same_pixels_and_facts(tmp_path, either_way):
    write_shard([pair(1), pair(2)], tmp_path / "a.parquet")
    row = read_manifest(tmp_path / "a.parquet")[1]
    assert np.array_equal(np.asarray(row["image_1"]), np.asarray(frame(102)))
    assert json.loads(row["slots"]) == {"hand": "left"}
    assert row["boxes_1"] == pair(2)["boxes_1"]


def test_a_small_manifest_leaves_no_cache_behind(tmp_path):
    write_shard([pair(1)], tmp_path / "a.parquet")
    read_manifest(tmp_path / "a.parquet")
    assert not (tmp_path / "cache").exists()


def test_images_are_stored_as_png(tmp_path):
    write_shard([pair(1)], tmp_path / "a.parquet")
    assert read_manifest(tmp_path)[0]["image_0"].format == "PNG"


def test_the_same_rows_give_the_same_file(tmp_path):
    write_shard([pair(1)], tmp_path / "a.parquet")
    write_shard([pair(1)], tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_load_dataset_reads_shards_without_our_code(tmp_path):
    write_shard([pair(1)], tmp_path / "set" / "train-000000.parquet")
    dataset = load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features == FEATURES


def test_shards_of_subfolders_are_joined_in_the_order_of_their_names(tmp_path, either_way):
    write_shard([pair(3)], tmp_path / "train" / "train-000100.parquet")
    write_shard([pair(1), pair(2)], tmp_path / "train" / "train-000000.parquet")
    assert read_manifest(tmp_path)["id"][:] == ["pair-1", "pair-2", "pair-3"]


def test_split_keeps_only_its_rows(tmp_path, either_way):
    write_shard([pair(1), pair(2, split="val")], tmp_path / "a.parquet")
    write_shard([pair(3)], tmp_path / "b.parquet")
    assert read_manifest(tmp_path, split="val")["id"][:] == ["pair-2"]


def test_an_unknown_split_names_the_splits_that_there_are(tmp_path):
    write_shard([pair(1)], tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"`split` .* got 'test'; this manifest has: train"):
        read_manifest(tmp_path, split="test")


def test_unknown_columns_are_kept(tmp_path, either_way):
    write_shard([pair(1, sharpness=0.5)], tmp_path / "a.parquet")
    write_shard([pair(2)], tmp_path / "b.parquet")
    assert read_manifest(tmp_path)["sharpness"][:] == [0.5, None]


def test_missing_optional_columns_become_null(tmp_path, either_way):
    row = {name: pair(1)[name] for name in ("id", "image_0", "action")}
    write_shard([row], tmp_path / "a.parquet")
    assert read_manifest(tmp_path)[0]["image_1"] is None


def test_a_foreign_parquet_file_without_optional_columns_is_read(tmp_path, either_way):
    frame(1).save(tmp_path / "f.png")
    images = pa.array([{"bytes": (tmp_path / "f.png").read_bytes(), "path": None}])
    write_parquet(tmp_path / "set" / "a.parquet", {"id": ["x"], "image_0": images, "action": ["open drawer"]})
    row = read_manifest(tmp_path / "set")[0]
    assert row["image_0"].size == (8, 8) and row["description"] is None


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    frame(1).save(tmp_path / "f.png")
    line = {"id": "x", "action": "open drawer", "image_0_file_name": "f.png", "slots": {"hand": "left"}, "rating": 3}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    row = read_manifest(tmp_path)[0]
    assert np.array_equal(np.asarray(row["image_0"]), np.asarray(frame(1)))
    assert row["rating"] == 3 and json.loads(row["slots"]) == {"hand": "left"}


def test_nothing_at_the_path_says_what_makes_a_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"examples\.kitchen\.render"):
        read_manifest(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"examples\.kitchen\.render"):
        read_manifest(tmp_path)


def test_a_missing_column_is_named_with_its_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": ["x"], "action": ["open drawer"]})
    with pytest.raises(ValueError, match=r"a\.parquet .*lacks image_0"):
        read_manifest(tmp_path)


def test_a_row_without_an_image_is_named(tmp_path):
    images = pa.array([{"bytes": b"1", "path": None}, {"bytes": None, "path": None}])
    write_parquet(tmp_path / "a.parquet", {"id": ["x", "y"], "image_0": images, "action": ["a", "b"]})
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: `image_0` is missing"):
        read_manifest(tmp_path)


def test_an_empty_action_is_named_with_its_line(tmp_path):
    frame(1).save(tmp_path / "f.png")
    lines = [
        {"id": str(i), "action": action, "image_0_file_name": "f.png"} for i, action in enumerate(("wash cup", ""))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 2: `action` is missing or empty"):
        read_manifest(tmp_path)


def test_a_missing_image_file_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"id": "x", "action": "wash cup", "image_0_file_name": "no.png"}\n')
    with pytest.raises(ValueError, match=r"row 1: image_0_file_name names no\.png"):
        read_manifest(tmp_path)


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"row 1: no JSON"):
        read_manifest(tmp_path)


def test_an_id_used_twice_is_named_with_both_places(tmp_path):
    write_shard([pair(1)], tmp_path / "a.parquet")
    write_shard([pair(2), pair(1)], tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: the id 'pair-1' is already that of .*a\.parquet, row 1"):
        read_manifest(tmp_path)


def test_a_box_with_swapped_corners_is_refused_on_writing(tmp_path):
    box = {"name": "cup", "x0": 0.5, "y0": 0.1, "x1": 0.2, "y1": 0.3}
    with pytest.raises(ValueError, match=r"row 1: `boxes_0` needs a name"):
        write_shard([pair(1, boxes_0=[box])], tmp_path / "a.parquet")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"a\.parquet is no readable parquet file"):
        read_manifest(tmp_path)


def test_a_refused_shard_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="`image_0` of row 1 must be a PIL image or bytes, got ndarray"):
        write_shard([pair(1, image_0=np.zeros((8, 8, 3)))], tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*"))


def test_an_interrupted_write_leaves_the_old_shard(tmp_path, monkeypatch):
    write_shard([pair(1)], tmp_path / "a.parquet")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lego_pipeline.data.manifest.pq.write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        write_shard([pair(2)], tmp_path / "a.parquet")
    assert read_manifest(tmp_path)["id"][:] == ["pair-1"]
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []
