"""Frame, seed and settings, which both tabs paint from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lego_pipeline.app.events import ON_MODEL
from lego_pipeline.app.messages import messages
from lego_pipeline.app.painter import Painter, Settings
from lego_pipeline.images import read_image


@dataclass(frozen=True)
class Inputs:
    """What both ways of painting start from.

    Attributes:
        frame: input component, the path of a file.
        values: input components of seed and settings, in the order that `read` takes them.
    """

    frame: Any
    values: list[Any]

    @staticmethod
    def read(path: str | None, *values: Any) -> tuple[Path, int, Settings]:
        """The frame's file, the seed and the settings that a visitor chose.

        Raises:
            ValueError: there is no frame, it is no picture, or there is no seed.
        """
        seed, steps, guidance_scale, image_guidance_scale, keep_scene, fast = values
        if path is None:
            raise ValueError("Drop a frame first, or take one of the examples.")
        if seed is None:
            raise ValueError("The seed must be a whole number, got none.")
        read_image(path)
        settings = Settings(
            steps=int(steps),
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            keep_scene=keep_scene,
            fast=fast,
        )
        return Path(path), int(seed), settings


def add_settings(painter: Painter) -> list[Any]:
    """Seed and advanced settings, in the order of `Inputs.read`."""
    import gradio as gr

    own = painter.defaults()
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
        fast = gr.Checkbox(False, label="Few steps, guidance in the weights", visible=painter.has_fast, elem_id="fast")
        steps = gr.Slider(1, painter.most_steps(), own.steps, step=1, label="Denoising steps", elem_id="steps")
        text = gr.Slider(
            0, 15, own.guidance_scale, step=0.1, label="Guidance scale of the action", elem_id="guidance-scale"
        )
        image = gr.Slider(
            0, 5, own.image_guidance_scale, step=0.1, label="Guidance scale of the frame", elem_id="image-scale"
        )
        keep = gr.Checkbox(
            painter.keeps_scene,
            label="Show the frame's own pixels where nothing changes",
            visible=painter.keeps_scene,
            elem_id="keep-scene",
        )

    def show_defaults(is_fast: bool) -> list[Any]:
        with messages():
            its, most = painter.defaults(fast=is_fast), painter.most_steps(fast=is_fast)
        return [
            gr.Slider(value=its.steps, maximum=most),
            gr.Slider(value=its.guidance_scale, interactive=not is_fast),
            gr.Slider(value=its.image_guidance_scale, interactive=not is_fast),
        ]

    fast.input(show_defaults, fast, [steps, text, image], show_progress="hidden", **ON_MODEL)
    return [seed, steps, text, image, keep, fast]
