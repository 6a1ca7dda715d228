"""The scripts of `examples/` and the code of the README run, on the embedded checkpoint and frames."""

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.images import read_image

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def main_of(name: str) -> Callable[..., None]:
    return runpy.run_path(str(ROOT / "examples" / name))["main"]


def test_a_call_and_its_stages_one_by_one_give_the_same_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("generate.py")(output=tmp_path / "call.png", row=1, steps=2)
    main_of("stage_by_stage.py")(output=tmp_path / "stages.png", row=1, steps=2)
    call, stages = (read_image(tmp_path / name).tobytes() for name in ("call.png", "stages.png"))
    assert max(abs(a - b) for a, b in zip(call, stages, strict=True)) <= 1
    out = capsys.readouterr().out
    assert all(stage in out for stage in ("enhance", "encode_condition", "encode_image", "denoise", "decode"))


def test_edited_descriptions_change_the_picture_and_go_on_a_sheet(tmp_path: Path) -> None:
    main_of("edited_descriptions.py")(output=tmp_path / "sheet.png", frames=2, steps=2)
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_words_are_exchanged_in_both_directions() -> None:
    exchange = runpy.run_path(str(ROOT / "examples" / "edited_descriptions.py"))["exchange"]
    assert exchange("the right hand holds the left drawer", "right", "left") == "the left hand holds the right drawer"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_example_says_how_it_is_run_and_is_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(source))
    assert 30 <= len(source.splitlines()) <= 90


def test_the_python_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_manifest(FRAMES)[0]["image_0"].save(tmp_path / "frame.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(script))
