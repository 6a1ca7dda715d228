"""Node that assembles the condition sequence as native CONDITIONING."""

import torch
from comfy_api.latest import io

from . import adapter
from .enhance import LegoEnhancementType
from .frames import lines_of
from .load import LegoPipelineType


class LegoEncodeCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoEncodeCondition",
            display_name="LEGO Encode Condition",
            category="LEGO/condition",
            description="Puts text, VLM embeddings and the encoded frame together. The first three outputs are the "
            "three passes of LEGO's guidance: connect them to LEGO Guidance, or to cond1, cond2 and negative of "
            "DualCFGGuider with style regular.",
            search_aliases=["conditioning", "lego"],
            inputs=[
                LegoPipelineType.Input("lego_pipeline", tooltip="From LEGO Load Pipeline; it holds the projector."),
                io.Clip.Input("clip", tooltip="The text encoder of LEGO Load Pipeline."),
                io.Latent.Input("image_latent", tooltip="The encoded frame, from LEGO Encode Frame."),
                LegoEnhancementType.Input(
                    "lego_enhancement",
                    optional=True,
                    tooltip="From LEGO Enhance Prompt or LEGO Edit Description. Without it `text` is used and the "
                    "VLM's part of the condition is zero.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Action or description when no enhancement is connected; leave it empty otherwise. One "
                    "text, or one on each line.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    optional=True,
                    tooltip="Guidance leads away from this text. Usually empty.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="condition", tooltip="Text, VLM embeddings and frame."),
                io.Conditioning.Output(display_name="image_only", tooltip="The frame without a text."),
                io.Conditioning.Output(display_name="null", tooltip="Neither text nor frame."),
                io.Latent.Output(
                    display_name="latent", tooltip="Empty latents for as many pictures as there are conditions."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        lego_pipeline: adapter.PipelineHandle,
        clip: object,
        image_latent: dict,
        lego_enhancement: list | None = None,
        text: str = "",
        negative_prompt: str = "",
    ) -> io.NodeOutput:
        if lego_enhancement is not None and text.strip():
            raise ValueError(
                f"`text` must be empty when an enhancement is connected, got {text.strip()!r}; clear it, or change "
                "the description with LEGO Edit Description."
            )
        texts = lines_of("text", text) if lego_enhancement is None else None
        condition, null = adapter.encode_condition(lego_pipeline, clip, lego_enhancement, texts, negative_prompt)
        frame = image_latent["samples"]
        count = max(len(frame), len(condition))
        for name, value in (("image_latent", frame), ("lego_enhancement or text", condition)):
            if len(value) not in (1, count):
                raise ValueError(
                    f"`{name}` must have one entry or as many as the other ({count}), got {len(value)}; use one frame "
                    "for all actions, or one for each."
                )
        frame = frame.expand(count, -1, -1, -1)
        pair = {"concat_latent_image": frame}
        return io.NodeOutput(
            [[condition, dict(pair)]],
            [[null, dict(pair)]],
            [[null, {}]],
            {"samples": torch.zeros_like(frame)},
        )


NODES = [LegoEncodeCondition]
