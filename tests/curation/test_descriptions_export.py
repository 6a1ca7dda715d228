"""Described pairs on disk: a manifest with the frames' own bytes, and the tuning file of LLaVA's code."""

import io
import json
from pathlib import Path

import PIL.Image
import pytest
from datasets import Dataset, Image

from lego_pipeline.curation.descriptions_export import write_llava, write_manifest
from lego_pipeline.data.manifest import read_manifest, write_shard


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """250 small pairs of a split, one of them of JPEG frames, and a column of its own."""
    jpeg = io.BytesIO()
    PIL.Image.new("RGB", (24, 16), "teal").save(jpeg, "JPEG")
    made = []
    for number in range(250):
        frame = jpeg.getvalue() if number == 1 else PIL.Image.new("RGB", (24, 16), (number, 10, 20))
        row = {"id": f"p/{number:03d}", "image_0": frame, "image_1": frame, "action": "take cup", "split": "train"}
        made.append(row | {"video": "v", "camera": number, "slots": {"hand": "right"}})
    write_shard(made, tmp_path / "data" / "train" / "0.parquet")
    return read_manifest(tmp_path / "data", "train")


def bytes_of(rows: Dataset, name: str) -> list[bytes]:
    return [row[name]["bytes"] for row in rows.cast_column(name, Image(decode=False))]


def test_described_rows_are_written_with_all_that_they_had(rows: Dataset, tmp_path: Path) -> None:
    ids = rows["id"][:]
    descriptions = {row_id: f"I take cup {row_id}." for row_id in ids[:205] if row_id != "p/007"}
    assert write_manifest(tmp_path / "out", rows, "train", descriptions) == 204
    written = read_manifest(tmp_path / "out", "train")
    assert written["id"][:] == list(descriptions) and written["description"][:] == list(descriptions.values())
    assert len(list((tmp_path / "out" / "train").iterdir())) == 3
    before = rows.select([number for number, row_id in enumerate(ids) if row_id in descriptions])
    for name in ("image_0", "image_1"):
        assert bytes_of(written, name) == bytes_of(before, name)
    for name in ("camera", "slots", "video", "split"):
        assert written[name][:] == before[name][:]


def test_a_second_run_repairs_and_removes_what_is_wrong(rows: Dataset, tmp_path: Path) -> None:
    descriptions = {row_id: "I take the cup." for row_id in rows["id"][:]}
    write_manifest(tmp_path / "out", rows, "train", descriptions)
    files = sorted((tmp_path / "out" / "train").iterdir())
    files[2].write_bytes(b"PAR1 cut off")
    write_manifest(tmp_path / "out", rows, "train", descriptions | {"p/110": "I lift the cup."})
    assert read_manifest(tmp_path / "out")["description"][:][110] == "I lift the cup."
    write_manifest(tmp_path / "out", rows, "train", dict(list(descriptions.items())[5:55]))
    assert read_manifest(tmp_path / "out")["id"][:] == rows["id"][5:55]


def test_rows_that_kept_their_ids_and_got_other_frames_are_written_anew(tmp_path: Path) -> None:
    descriptions = {"a": "I take the cup."}
    for number, (colour, licence) in enumerate((("teal", "CC0"), ("red", "CC-BY"))):
        frame = PIL.Image.new("RGB", (24, 16), colour)
        row = {"id": "a", "image_0": frame, "image_1": frame, "action": "take cup", "split": "train"}
        write_shard([row | {"licence": licence}], tmp_path / str(number) / "0.parquet")
        rows = read_manifest(tmp_path / str(number), "train")
        write_manifest(tmp_path / "out", rows, "train", descriptions)
        write_llava(tmp_path / "llava", rows, "train", descriptions, "How {}?")
    written = read_manifest(tmp_path / "out", "train")
    assert bytes_of(written, "image_0") == bytes_of(written, "image_1") == bytes_of(rows, "image_0")
    assert written["licence"][:] == ["CC-BY"]
    assert (tmp_path / "llava/images/train/a.png").read_bytes() == bytes_of(rows, "image_0")[0]


def test_the_llava_file_names_frames_that_are_there(rows: Dataset, tmp_path: Path) -> None:
    file = write_llava(
        tmp_path / "llava", rows, "train", {"p/000": "I take it.", "p/001": "I « lift » it."}, "How {}?"
    )
    first, second = json.loads(file.read_text(encoding="utf-8"))
    assert first == {
        "id": "p/000",
        "image": "images/train/p%2F000.png",
        "conversations": [
            {"from": "human", "value": "<image>\nHow take cup?"},
            {"from": "gpt", "value": "I take it."},
        ],
    }
    assert second["image"].endswith(".jpg") and second["conversations"][1]["value"] == "I « lift » it."
    for entry, expected in zip((first, second), bytes_of(rows, "image_0"), strict=False):
        assert (file.parent / entry["image"]).read_bytes() == expected
