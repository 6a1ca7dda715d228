"""The page's parts that can be tried without a server: messages, and what a visitor may enter.

Gradio leaves sockets open that it makes for a page, so no page is built in this process.
"""

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.app.events import set_flag, start
from lego_pipeline.app.inputs import Inputs
from lego_pipeline.app.messages import messages, one_line, told
from lego_pipeline.app.painter import Settings
from lego_pipeline.app.storyboard import MOST_ACTIONS, read_lines

VALUES = (7, 2.0, 3.5, 1.25, True, False)  # seed, steps, scales, keep scene, fast, as the page's inputs give them


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return pytest.importorskip("gradio", reason='Gradio is not here: pip install "lego-pipeline[app]"')


@pytest.fixture
def notes(gradio: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that the page shows."""
    shown: list[str] = []
    monkeypatch.setattr(gradio, "Warning", shown.append)
    return shown


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, RuntimeError])
def test_what_is_refused_is_an_error_of_the_page(kind: type[Exception], gradio: Any) -> None:
    with pytest.raises(gradio.Error, match="no such frame") as refused, messages():
        raise kind("no such\n frame")
    assert refused.value.print_exception is False


def test_words_of_a_visitor_are_not_taken_for_html() -> None:
    assert one_line(ValueError("no <b>such</b> frame")) == "no &lt;b&gt;such&lt;/b&gt; frame"


def test_a_mistake_of_the_program_is_not_hidden(gradio: Any) -> None:
    with pytest.raises(KeyError), messages():
        raise KeyError("name")


def test_warnings_of_the_library_are_notes_and_each_is_shown_once(notes: list[str]) -> None:
    with messages():
        for text in ("far from the training frames", "far from the training frames", "cut off"):
            warnings.warn(text, stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert notes == ["far from the training frames", "cut off"]


def test_results_come_one_by_one_until_one_is_refused(gradio: Any, notes: list[str]) -> None:
    def results() -> Iterator[int]:
        yield 1
        warnings.warn("enlarged", stacklevel=1)
        yield 2
        raise ValueError("no memory")

    came = []
    with pytest.raises(gradio.Error, match="no memory"):
        for result in told(results()):
            came.append((result, list(notes)))
    assert came == [(1, []), (2, ["enlarged"])]


def test_values_of_the_page_become_settings(frame_file: Path) -> None:
    settings = Settings(steps=2, guidance_scale=3.5, image_guidance_scale=1.25, keep_scene=True, fast=False)
    assert Inputs.read(str(frame_file), *VALUES) == (frame_file, 7, settings)


def test_a_frame_and_a_seed_are_asked_for(frame_file: Path) -> None:
    with pytest.raises(ValueError, match="Drop a frame first"):
        Inputs.read(None, *VALUES)
    with pytest.raises(ValueError, match="seed must be a whole number, got none"):
        Inputs.read(str(frame_file), None, *VALUES[1:])


def test_a_frame_that_is_none_is_refused_before_anything_is_lost(tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="must be of a format that Pillow reads"):
        Inputs.read(str(tmp_path / "frame.png"), *VALUES)


def test_a_storyboard_has_an_action_on_each_line() -> None:
    assert read_lines(" open drawer \n\n take spoon\n") == ["open drawer", "take spoon"]
    assert len(read_lines("cut\n" * MOST_ACTIONS)) == MOST_ACTIONS


@pytest.mark.parametrize("text", ["", None, " \n ", "cut\n" * (MOST_ACTIONS + 1)])
def test_a_storyboard_without_or_with_too_many_actions_is_refused(text: str | None) -> None:
    with pytest.raises(ValueError, match=f"needs one to {MOST_ACTIONS} actions"):
        read_lines(text)


def test_stop_sets_the_flag_of_its_own_run(gradio: Any) -> None:
    flags = [start()[0] for _ in range(2)]
    set_flag(flags[0])
    set_flag(None)
    assert [flag.is_set() for flag in flags] == [True, False]
    assert all(isinstance(flag, threading.Event) for flag in flags)
