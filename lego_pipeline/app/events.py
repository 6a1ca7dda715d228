"""How the page's buttons are wired: which wait for the model, which answer at once, and how a run is stopped."""

import threading
from typing import Any

from lego_pipeline.app.results import Run

ON_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Answers while others wait for the model; only what is queued can show a note.
BESIDE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
KEPT_SECONDS = 24 * 3600  # how long the files of a visitor who left are kept at most


def start() -> tuple[threading.Event, Any, Any]:
    """A fresh flag, and Stop in place of the button that was pressed."""
    import gradio as gr

    return threading.Event(), gr.Button(interactive=False), gr.Button(interactive=True)


def finish() -> tuple[Any, Any]:
    """The buttons as they were before `start`."""
    import gradio as gr

    return gr.Button(interactive=True), gr.Button(interactive=False)


def set_flag(flag: threading.Event | None) -> None:
    """Stops what watches the flag, also while it waits for its turn."""
    if flag is not None:
        flag.set()


def remove(run: Run | None) -> None:
    """Deletes the files of a run that nobody sees any more."""
    if run is not None:
        run.remove()
