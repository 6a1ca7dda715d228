"""The tab for a storyboard: actions in a row from a single frame, and how far the pictures drift from it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lego_pipeline.app.drift import draw_drift
from lego_pipeline.app.events import AT_ONCE, KEPT_SECONDS, ON_MODEL, finish, remove, set_flag, start
from lego_pipeline.app.inputs import Inputs
from lego_pipeline.app.messages import messages, told
from lego_pipeline.app.painter import Painter
from lego_pipeline.app.results import Run

MOST_ACTIONS = 12
START = "Each action is described and painted in turn."


def add_storyboard(painter: Painter, folder: Path, inputs: Inputs) -> None:
    """Adds the tab to the page that is being built; arguments as for `add_one_action`."""
    import gradio as gr

    with gr.Tab("Storyboard", id="storyboard"):
        lines = gr.Textbox(
            label="Actions, one on each line",
            lines=3,
            max_lines=MOST_ACTIONS,
            placeholder="open drawer\ntake spoon\nclose drawer",
            elem_id="lines",
        )
        with gr.Row():
            follow = gr.Radio(
                [("the picture before", "previous"), ("the first frame", "first")],
                value="previous",
                label="Each picture starts from",
                elem_id="follow",
            )
        with gr.Row():
            paint_all = gr.Button("Paint", variant="primary", min_width=90, size="md", elem_id="paint")
            stop = gr.Button("Stop", variant="stop", min_width=70, size="md", interactive=False, elem_id="stop-board")
        status = gr.Markdown(START, min_height=52, elem_id="board-status")
        board = gr.Gallery(
            label="Storyboard",
            columns=4,
            fit_columns=False,
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="board",
        )
        texts = gr.Markdown(elem_id="texts")
        curve = gr.HTML(elem_id="drift")
        archive = gr.DownloadButton("Storyboard (.zip)", interactive=False, size="md", elem_id="board-zip")
        run = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=remove)
        flag = gr.State(None)
    bar = gr.Progress()

    def paint(
        path: str | None,
        text: str,
        way: str,
        stopping: threading.Event,
        before: Run | None,
        progress: Any = bar,
        *values: Any,
    ) -> Iterator[dict[Any, Any]]:
        def watch(share: float, doing: str) -> bool:
            progress(share, desc=doing)
            return not stopping.is_set()

        with messages():
            actions = read_lines(text)
            frame, seed, settings = inputs.read(path, *values)
            now = Run.start(frame, folder)
        yield {
            status: "",
            run: now,
            board: [(str(now.frame), "frame")],
            texts: "",
            curve: "",
            archive: gr.DownloadButton(interactive=False),
        }
        remove(before)
        for done in told(painter.paint_storyboard(now, actions, seed, settings, way, watch)):
            records = [done.record(k) for k in range(len(done.files))]
            titles = [f"{k + 1}. {record['action']}" for k, record in enumerate(records)]
            yield {
                run: done,
                board: [(str(done.frame), "frame"), *zip(map(str, done.files), titles, strict=True)],
                texts: "\n".join(f"{k + 1}. {record['description']}" for k, record in enumerate(records)),
                curve: draw_drift(done.drift, titles, way),
                archive: gr.DownloadButton(value=str(done.zip()), interactive=True),
            }
        if len(now.files) < len(actions):
            yield {status: f"Stopped after {len(now.files)} of {len(actions)}; what was finished stays."}
        else:
            yield {status: "The curve below shows how far the pictures have drifted from the first frame."}

    painted = paint_all.click(start, None, [flag, paint_all, stop], **AT_ONCE).then(
        paint,
        [inputs.frame, lines, follow, flag, run, *inputs.values],
        [status, run, board, texts, curve, archive],
        show_progress_on=status,
        **ON_MODEL,
    )
    for ended in (painted.success, painted.failure):
        ended(finish, None, [paint_all, stop], **AT_ONCE)
    stop.click(set_flag, flag, None, **AT_ONCE)


def read_lines(text: str | None) -> list[str]:
    """The actions of a text, one on each line, empty lines left out.

    Raises:
        ValueError: there is none, or there are more than `MOST_ACTIONS`.
    """
    actions = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not 1 <= len(actions) <= MOST_ACTIONS:
        raise ValueError(
            f"A storyboard needs one to {MOST_ACTIONS} actions, got {len(actions)}; write one on each line, such as "
            '"open drawer".'
        )
    return actions
