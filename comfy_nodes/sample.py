"""Nodes that generate: LEGO's guidance for ComfyUI's samplers, and storyboards of several actions."""

import torch
from comfy_api.latest import io

from lego_pipeline.storyboard import FOLLOW, paint_storyboard

from . import adapter
from .enhance import VLM_TIP
from .frames import lines_of, to_frames, to_image
from .load import LegoPipelineType, LegoVlmType

OWN = -1.0  # of a scale widget: the checkpoint's own value


class LegoGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoGuidance",
            display_name="LEGO Guidance",
            category="LEGO/sample",
            description="Guidance with two scales for SamplerCustomAdvanced: null + image scale (image only - null) + "
            "text scale (condition - image only). An image scale of 1 saves a third of the work, both 1 two thirds.",
            search_aliases=["dual cfg", "guider", "lego"],
            inputs=[
                io.Model.Input("model", tooltip="From LEGO Load Pipeline."),
                io.Conditioning.Input("condition", tooltip="From LEGO Encode Condition."),
                io.Conditioning.Input("image_only", tooltip="From LEGO Encode Condition."),
                io.Conditioning.Input("null", tooltip="From LEGO Encode Condition."),
                io.Float.Input(
                    "guidance_scale",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Text scale: how strongly the picture follows action and description. Connect LEGO Load "
                    "Pipeline's output for the checkpoint's own.",
                ),
                io.Float.Input(
                    "image_guidance_scale",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Image scale: how strongly the picture keeps to the frame.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        condition: list,
        image_only: list,
        null: list,
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> io.NodeOutput:
        scales = guidance_scale, image_guidance_scale
        return io.NodeOutput(adapter.two_scale_guider(model, condition, image_only, null, *scales))


class LegoPaintStoryboard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoPaintStoryboard",
            display_name="LEGO Paint Storyboard",
            category="LEGO/sample",
            description="Several actions in a row: each picture is the frame of the next action, or all start from "
            "the first frame. Runs the library's own pipeline, so a script gives the same pictures.",
            search_aliases=["sequence", "steps", "recipe", "lego"],
            inputs=[
                LegoPipelineType.Input("lego_pipeline", tooltip="From LEGO Load Pipeline."),
                io.Image.Input("image", tooltip="The first frame: one picture. Transparency is cut off."),
                io.String.Input(
                    "actions",
                    default="open drawer\nclose drawer",
                    multiline=True,
                    tooltip="The actions in their order, one on each line.",
                ),
                io.Combo.Input(
                    "follow",
                    options=list(FOLLOW),
                    default=FOLLOW[0],
                    tooltip="previous: each picture feeds the next action. first: every action starts from the first "
                    "frame, so that errors don't add up.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of descriptions and noise.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="Steps for each picture. 0: the checkpoint's own."
                ),
                io.Float.Input(
                    "guidance_scale",
                    default=OWN,
                    min=OWN,
                    max=100.0,
                    step=0.1,
                    tooltip="Text scale. -1: the checkpoint's own.",
                ),
                io.Float.Input(
                    "image_guidance_scale",
                    default=OWN,
                    min=OWN,
                    max=100.0,
                    step=0.1,
                    tooltip="Image scale. -1: the checkpoint's own.",
                ),
                LegoVlmType.Input(
                    "lego_vlm", optional=True, tooltip=f"{VLM_TIP} Without it the actions themselves are the texts."
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The pictures in the order of the actions, without the first frame."),
                io.String.Output(display_name="descriptions", tooltip="Their descriptions, one on each line."),
            ],
        )

    @classmethod
    def execute(
        cls,
        lego_pipeline: adapter.PipelineHandle,
        image: torch.Tensor,
        actions: str,
        follow: str,
        seed: int,
        steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        lego_vlm: adapter.VlmHandle | None = None,
    ) -> io.NodeOutput:
        names, frames = lines_of("actions", actions), to_frames(image)
        if len(frames) != 1:
            raise ValueError(f"`image` must be one picture, got {len(frames)}; pick one with ImageFromBatch.")
        config = lego_pipeline.config
        num_steps = steps or config["num_inference_steps"]
        panels = paint_storyboard(
            lego_pipeline.pipeline(),
            frames[0],
            names,
            follow=follow,
            enhance=None if lego_vlm is None else adapter.enhance_then_return(lego_vlm, lego_pipeline),
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=num_steps,
            guidance_scale=config["guidance_scale"] if guidance_scale < 0 else guidance_scale,
            image_guidance_scale=config["image_guidance_scale"] if image_guidance_scale < 0 else image_guidance_scale,
            callback_on_step_end=adapter.step_callback(lego_pipeline.latent_format, len(names) * num_steps),
        )
        text = "\n".join(" ".join(panel.description.split()) for panel in panels)
        return io.NodeOutput(to_image([panel.image for panel in panels]), text)


NODES = [LegoGuidance, LegoPaintStoryboard]
