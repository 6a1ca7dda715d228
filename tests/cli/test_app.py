"""`lego app`: what is refused before anything is loaded, and what it hands to the page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.app import server
from lego_pipeline.cli import main
from lego_pipeline.cli.app import EXAMPLES, write_examples
from lego_pipeline.images import read_image


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be served; the page is ready at once and left at once."""
    seen: dict[str, Any] = {}

    def serve(painter: Any, listening: Any, folder: Path, **texts: Any) -> None:
        seen.update(painter=painter, folder=folder, port=listening.getsockname()[1], **texts)
        texts["ready"]()

    monkeypatch.setattr(server, "serve", serve)
    return seen


def test_a_model_is_served_with_its_name_and_fingerprint(
    tiny_folder: Path, served: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", "--model", str(tiny_folder), "--port", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "url": f"http://127.0.0.1:{served['port']}"}
    painter = served["painter"]
    assert painter.model == str(tiny_folder) and painter.has_vlm and not painter.has_fast
    assert len(painter.requests[0]["model"]) == 16 and painter.requests[0]["dtype"] == "float32"
    assert served["examples"] == [] and str(tiny_folder) in served["note"]
    assert painter.cache.folder.parent == served["folder"] and not served["folder"].exists()


def test_a_cache_that_is_named_is_used(tiny_folder: Path, served: dict[str, Any], tmp_path: Path) -> None:
    argv = ["app", "--model", str(tiny_folder), "--port", "0", "--cache", str(tmp_path / "cache")]
    assert main(argv) == 0
    assert served["painter"].cache.folder == tmp_path / "cache"


def test_examples_are_frames_of_different_actions(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "examples")
    assert len({example.action for example in examples}) == len(examples) == EXAMPLES
    assert {read_image(example.path).size for example in examples} == {(128, 128)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "`--port` must be from 0 to 65535, got 70000"),
        (["--host", "192.0.2.1"], "must be an address of this machine"),
        (["--port", "0", "--model", "no-such-folder/here"], "no-such-folder/here"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_gradio_is_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("lego_pipeline.cli.model.ModelOptions.load", lambda *_, **__: pytest.fail("it was loaded"))
    assert main(["app", "--port", "0"]) == 2
    assert 'pip install "lego-pipeline[app]"' in capsys.readouterr().err
