"""`lego demo` draws frames of different actions, the same ones for the same seed."""

import json
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

import lego_pipeline.checkpoints
from lego_pipeline.cli import main
from lego_pipeline.cli.demo import choose
from lego_pipeline.cli.records import PNG_KEY
from lego_pipeline.data.manifest import write_shard


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_frame: Callable[..., PIL.Image.Image]) -> None:
    """Three frames in place of the embedded ones."""
    rows = [
        {"id": str(i), "image_0": make_frame(32, 32, i), "image_1": make_frame(32, 32, i + 9), "action": action}
        for i, action in enumerate(("take cup", "take cup", "open tap"))
    ]
    write_shard(rows, tmp_path / "frames" / "frames.parquet")
    monkeypatch.setattr(lego_pipeline.checkpoints, "FRAMES", tmp_path / "frames")


@pytest.mark.usefixtures("embedded")
def test_the_sheet_is_written_with_what_is_on_it(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "demo.png"
    argv = ["demo", "--model", str(tiny_folder), "--output", str(output), "--frames", "2"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(sample["action"] for sample in result["samples"]) == ["open tap", "take cup"]
    with PIL.Image.open(output) as sheet:
        assert json.loads(sheet.info[PNG_KEY])["samples"] == result["samples"]
    first = output.read_bytes()
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{output}: 2 frames in ")
    assert output.read_bytes() == first


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--frames", "4"], "`--frames` must be at most 3"),
        (["--frames", "0"], "`--frames` must be at least 1, got 0"),
        (["--output", "demo.gif"], "must end in .png"),
    ],
)
def test_a_refused_request_says_why_and_writes_nothing(
    argv: list[str],
    expected: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["demo", "--model", str(tiny_folder), *argv]) == 2
    assert expected in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_every_action_is_chosen_once_before_any_comes_twice() -> None:
    actions = ["a", "a", "a", "b", "b", "c"]
    chosen = choose(actions, 5, seed=0)
    assert sorted(actions[row] for row in chosen[:3]) == ["a", "b", "c"]
    assert len(set(chosen)) == 5


def test_another_seed_chooses_other_frames() -> None:
    actions = [str(i) for i in range(20)]
    assert choose(actions, 8, seed=0) == choose(actions, 8, seed=0) != choose(actions, 8, seed=1)
