"""`lego enhance` prints what the VLM writes and saves what belongs to it."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from lego_pipeline.cli import main
from lego_pipeline.enhance import vlm_id
from lego_pipeline.vlm import Enhancement, llava


@pytest.fixture
def picture(tmp_path: Path, frame: PIL.Image.Image) -> Path:
    path = tmp_path / "frame.png"
    frame.save(path)
    return path


def test_a_description_of_your_own_is_printed_as_it_is(
    picture: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["enhance", "--model", str(tiny_folder), "--image", str(picture), "--description", "I open it."]) == 0
    assert capsys.readouterr().out == "I open it.\n"


def test_the_saved_file_holds_what_the_pipeline_gives(
    picture: Path, tiny_folder: Path, tmp_path: Path, tiny_pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "enhancement.safetensors"
    argv = ["--model", str(tiny_folder), "--image", str(picture), "--action", "open drawer", "--seed", "3"]
    assert main(["enhance", *argv, "--output", str(output), "--json"]) == 0
    saved, result = Enhancement.load(output), json.loads(capsys.readouterr().out)
    generator = torch.Generator().manual_seed(3)
    [expected] = tiny_pipeline.enhance(PIL.Image.open(picture), "open drawer", generator=generator)
    assert saved.description == expected.description == result["description"]
    assert saved.vlm_id == vlm_id(tiny_pipeline.vlm, tiny_pipeline.vlm_processor)
    torch.testing.assert_close(saved.text_embeds, expected.text_embeds)
    assert result["image_embeds"] == list(expected.image_embeds.shape)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_cache_that_generating_fills_is_the_one_that_enhancing_reads(
    picture: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = ["--model", str(tiny_folder), "--image", str(picture), "--action", "open drawer", "--json"]
    shared += ["--cache", str(tmp_path / "cache")]
    assert main(["generate", *shared, "--steps", "1", "--output", str(tmp_path / "out.png")]) == 0
    drawn = json.loads(capsys.readouterr().out)["samples"][0]["description"]
    for name in ("frame_states", "generate", "embed"):
        monkeypatch.setattr(llava, name, lambda *_, **__: pytest.fail("the VLM was called"))
    assert main(["enhance", *shared, "--seed", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["description"] == drawn


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "`--action` or `--description`"),
        (["--action", "a", "--output", "e.pt"], "must end in .safetensors"),
        (["--action", "a", "--seed=-1"], "`--seed`"),
        (["--output", "new/e.safetensors"], "`--action` or `--description`"),
        (["--action", "a", "--seed=-1", "--output", "new/e.safetensors"], "`--seed`"),
    ],
)
def test_a_refused_request_says_why_and_writes_nothing(
    argv: list[str],
    expected: str,
    picture: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["enhance", "--model", str(tiny_folder), "--image", str(picture), *argv]) == 2
    assert expected in capsys.readouterr().err
    assert not list(Path().iterdir())
