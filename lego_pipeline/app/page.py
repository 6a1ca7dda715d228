"""The page: a frame and settings on the left, on the right one action or a storyboard.

What a visitor has made is state of that visitor's page alone. Everything that asks the model shares one queue, one at
a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lego_pipeline.app.events import AT_ONCE, BESIDE, KEPT_SECONDS
from lego_pipeline.app.inputs import Inputs, add_settings
from lego_pipeline.app.messages import one_line
from lego_pipeline.app.one_action import add_one_action
from lego_pipeline.app.painter import Painter
from lego_pipeline.app.storyboard import add_storyboard
from lego_pipeline.images import read_image


@dataclass(frozen=True)
class Example:
    """A frame that can be clicked, and an action that fits it."""

    path: Path
    action: str


def build_page(painter: Painter, folder: Path, *, title: str, note: str = "", examples: Sequence[Example] = ()) -> Any:
    """The page as Gradio's Blocks, not yet served.

    Args:
        painter: the model.
        folder: where pictures go until the visitor leaves.
        title: of the page.
        note: what a visitor should know of the model, Markdown.
        examples: frames to start from; their actions are what can be picked.
    """
    import gradio as gr

    def check_frame(payload: dict[str, Any] | None) -> Any:
        path = Path(payload["path"]) if payload else None
        try:
            if path is not None:
                read_image(path)
        except (OSError, ValueError) as error:
            reason = one_line(error).replace(str(path), path.name)
            gr.Warning(f"This frame can't be used: {reason}")
            return None
        return gr.skip()

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {title}\n{note}", elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                frame = gr.Image(
                    label="Frame",
                    image_mode=None,
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=280,
                    buttons=["fullscreen"],
                    placeholder="Drop a frame here, or click to choose a file",
                    elem_id="frame",
                )
                gr.Markdown("Or take one of these, with an action that fits:", visible=bool(examples))
                shelf = gr.Gallery(
                    [(str(example.path), example.action) for example in examples],
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=bool(examples),
                    elem_id="examples",
                )
                values = add_settings(painter)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                inputs = Inputs(frame, values)
                action = add_one_action(painter, folder, inputs, sorted({example.action for example in examples}))
                add_storyboard(painter, folder, inputs)

        def take_example(event: gr.SelectData) -> tuple[str, str]:
            example = examples[event.index]
            return str(example.path), example.action

        shelf.select(take_example, None, [frame, action], **AT_ONCE)
        # Not preprocessed, which would open a bad file first and report it in other words.
        frame.upload(check_frame, frame, frame, preprocess=False, **BESIDE)
    return page
