"""What is downloaded: PNGs with their parameters, and everything in a ZIP."""

import io
import json
import zipfile
from pathlib import Path

import PIL.Image
import pytest

from lego_pipeline.app.results import Picture, Run, file_name
from lego_pipeline.cli.records import PNG_KEY, read_png_record


def picture(name: str, image: PIL.Image.Image, **facts: object) -> Picture:
    return Picture(image=image, record={"id": name, **facts})


def test_a_png_has_its_record_in_its_text(frame: PIL.Image.Image, tmp_path: Path) -> None:
    path = picture("open-drawer", frame, seed=3).write(tmp_path)
    assert path == tmp_path / "open-drawer.png"
    assert read_png_record(path) == {"id": "open-drawer", "seed": 3}


def test_a_zip_has_frame_pictures_records_and_drift(frame: PIL.Image.Image, frame_file: Path, tmp_path: Path) -> None:
    run = Run.start(frame_file, tmp_path)
    for name in ("one", "two"):
        run.add(picture(name, frame, description=name))
    run.drift.append({"first": 1.5, "source": 1.5})
    with zipfile.ZipFile(run.zip()) as archive:
        assert archive.namelist() == ["frame/frame.png", "one.png", "two.png", "generation.jsonl", "drift.json"]
        lines = archive.read("generation.jsonl").decode().splitlines()
        assert [json.loads(line)["description"] for line in lines] == ["one", "two"]
        assert json.loads(archive.read("drift.json")) == run.drift
        with PIL.Image.open(io.BytesIO(archive.read("two.png"))) as image:
            assert json.loads(image.info[PNG_KEY])["id"] == "two"


def test_a_picture_that_is_dropped_again_is_not_overwritten(frame: PIL.Image.Image, tmp_path: Path) -> None:
    before = picture("open-drawer-seed-0", frame, seed=0).write(tmp_path)
    run = Run.start(before, tmp_path)
    run.add(picture("open-drawer-seed-0", PIL.Image.new("RGB", frame.size), seed=1))
    assert read_png_record(run.frame) == {"id": "open-drawer-seed-0", "seed": 0}
    assert run.frame.name == before.name


def test_a_removed_run_leaves_nothing(frame: PIL.Image.Image, frame_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = Run.start(frame_file, place)
    run.add(picture("one", frame))
    run.remove()
    run.remove()
    assert not list(place.iterdir()) and frame_file.exists()


@pytest.mark.parametrize(
    ("action", "name"),
    [
        ("open drawer", "open-drawer"),
        (" Öffne/../die Tür ", "ffne-die-t-r"),
        ("開ける", "action"),
        ("a" * 99, "a" * 60),
    ],
)
def test_a_name_is_fit_for_any_file_system(action: str, name: str) -> None:
    assert file_name(action) == name
    assert file_name(action, 4) == f"{name}-seed-4"
