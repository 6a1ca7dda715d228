"""The tab for one action: describe, read and edit, paint from several seeds, compare, download."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lego_pipeline.app.events import AT_ONCE, KEPT_SECONDS, ON_MODEL, finish, remove, set_flag, start
from lego_pipeline.app.inputs import Inputs
from lego_pipeline.app.messages import messages, told
from lego_pipeline.app.painter import Painter, checked_action
from lego_pipeline.app.results import Run

MOST_PICTURES = 8
START = "Choose a frame and an action; *Describe* and read what will be painted, or *Generate* at once."
START_WITHOUT_VLM = "Choose a frame and an action, and *Generate*."
HINT = "How the action is carried out in this frame."
VLM_HINT = "Describe lets the visual LLM write it; read it, change it, or write your own. Empty: Generate does both."


def add_one_action(painter: Painter, folder: Path, inputs: Inputs, actions: Sequence[str]) -> Any:
    """Adds the tab to the page that is being built.

    Args:
        painter: the model.
        folder: where pictures go.
        inputs: frame and settings.
        actions: that can be picked.

    Returns:
        The input component of the action.
    """
    import gradio as gr

    with gr.Tab("One action", id="one"):
        with gr.Row(equal_height=True):
            action = gr.Dropdown(
                list(actions),
                value=None,
                label="Action: pick one or type your own" if actions else "Action",
                allow_custom_value=True,
                scale=3,
                elem_id="action",
            )
            count = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures, one seed each", scale=2, elem_id="count")
        description = gr.Textbox(
            label="Description",
            lines=3,
            placeholder=f"{HINT} {VLM_HINT}" if painter.has_vlm else HINT,
            elem_id="description",
        )
        with gr.Row():
            describe = gr.Button("Describe", min_width=90, size="md", visible=painter.has_vlm, elem_id="describe")
            generate = gr.Button("Generate", variant="primary", min_width=90, size="md", elem_id="generate")
            stop = gr.Button("Stop", variant="stop", min_width=70, size="md", interactive=False, elem_id="stop")
        status = gr.Markdown(START if painter.has_vlm else START_WITHOUT_VLM, min_height=52, elem_id="status")
        pictures = gr.Gallery(
            label="Frame and pictures",
            columns=3,
            fit_columns=False,
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="pictures",
        )
        with gr.Row():
            png = gr.DownloadButton("This picture (.png)", interactive=False, size="md", elem_id="png")
            archive = gr.DownloadButton("All of them (.zip)", interactive=False, size="md", elem_id="zip")
            reuse = gr.Button("Go on from this picture", interactive=False, size="md", elem_id="reuse")
        with gr.Accordion("Parameters of this picture", open=False, elem_id="parameters"):
            parameters = gr.JSON(show_label=False)
        run = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=remove)
        shown = gr.State(0)  # number of the picture that is looked at
        own_text = gr.State("")  # what the VLM wrote, to know it from what the visitor wrote
        flag = gr.State(None)  # set to stop
    bar = gr.Progress()  # Gradio looks for it among the defaults

    def forget_description(text: str, own: str) -> Any:
        return "" if text == own else gr.skip()

    def write_description(path: str | None, label: str | None, *values: Any) -> tuple[str, str]:
        with messages():
            text = painter.describe(inputs.read(path, *values)[0], checked_action(label))
        return text, text

    def show(now: Run, number: int) -> dict[Any, Any]:
        return {
            shown: number,
            parameters: now.record(number),
            png: gr.DownloadButton(value=str(now.files[number]), interactive=True),
        }

    def paint(
        path: str | None,
        label: str | None,
        text: str,
        number: int,
        stopping: threading.Event,
        before: Run | None,
        progress: Any = bar,
        *values: Any,
    ) -> Iterator[dict[Any, Any]]:
        def watch(share: float, doing: str) -> bool:
            progress(share, desc=doing)
            return not stopping.is_set()

        with messages():
            frame, seed, settings = inputs.read(path, *values)
            wanted = checked_action(label)
            now = Run.start(frame, folder)
        yield {
            status: "",
            run: now,
            pictures: _tiles(now),
            png: _off(gr),
            archive: _off(gr),
            reuse: gr.Button(interactive=False),
        }
        remove(before)
        for done in told(painter.paint_seeds(now, wanted, text, seed, int(number), settings, watch)):
            last = len(done.files) - 1
            written = done.record(last)["description"]
            filled = {} if text.strip() else {description: written, own_text: written}
            yield {
                run: done,
                pictures: _tiles(done),
                archive: gr.DownloadButton(value=str(done.zip()), interactive=True),
                reuse: gr.Button(interactive=True),
                **filled,
                **show(done, last),
            }
        if len(now.files) < number:
            yield {status: f"Stopped after {len(now.files)} of {number}; what was finished stays."}
        else:
            yield {status: "Click a picture to enlarge it; the buttons below it are about that one."}

    def look(now: Run | None, event: gr.SelectData) -> dict[Any, Any]:
        number = event.index - 1  # the frame comes first
        if now is None or not 0 <= number < len(now.files):
            return {parameters: gr.skip()}
        return show(now, number)

    def go_on(now: Run | None, number: int) -> Any:
        return str(now.files[number]) if now is not None and now.files else gr.skip()

    asked = [inputs.frame, action, *inputs.values]
    for changed in (inputs.frame, action):
        changed.change(forget_description, [description, own_text], description, **AT_ONCE)
    describe.click(write_description, asked, [description, own_text], show_progress_on=description, **ON_MODEL)
    results = [status, run, shown, own_text, description, pictures, parameters, png, archive, reuse]
    painted = generate.click(start, None, [flag, generate, stop], **AT_ONCE).then(
        paint,
        [inputs.frame, action, description, count, flag, run, *inputs.values],
        results,
        show_progress_on=status,
        **ON_MODEL,
    )
    for ended in (painted.success, painted.failure):  # `then` isn't called after a failure
        ended(finish, None, [generate, stop], **AT_ONCE)
    stop.click(set_flag, flag, None, **AT_ONCE)
    pictures.select(look, run, [shown, parameters, png], **AT_ONCE)
    reuse.click(go_on, [run, shown], inputs.frame, **AT_ONCE)
    return action


def _tiles(run: Run) -> list[tuple[str, str]]:
    """Frame and pictures of a run with captions."""
    seeds = [(str(file), f"seed {run.record(k)['seed']}") for k, file in enumerate(run.files)]
    return [(str(run.frame), "frame"), *seeds]


def _off(gr: Any) -> Any:
    return gr.DownloadButton(interactive=False)
