"""Nodes around the visual LLM: describe an action in a frame, embed an edited description, keep both on disk."""

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from . import adapter
from .frames import lines_of, to_frames
from .load import LegoVlmType

LegoEnhancementType = io.Custom("LEGO_ENHANCEMENT")
ACTION_TIP = 'What to do in the frame, such as "open drawer". One action, or one on each line.'
FRAME_TIP = "One frame for all actions, or as many frames as actions. Transparency is cut off."
VLM_TIP = "From LEGO Load VLM."


def outputs() -> list[Any]:
    """What the nodes here give."""
    return [
        LegoEnhancementType.Output(display_name="lego_enhancement", tooltip="Descriptions with the VLM's embeddings."),
        io.String.Output(display_name="description", tooltip="The descriptions, one on each line."),
    ]


def enhanced(vlm: adapter.VlmHandle, image: torch.Tensor, num_tokens: int, **arguments: Any) -> io.NodeOutput:
    """Runs `LegoPipeline.enhance` with progress and cancel."""
    frames = to_frames(image)
    counts = [len(value) for value in (arguments.get("action"), arguments.get("description"), frames) if value]
    vlm_id, pipe = vlm.vlm_id(), vlm.on_device(max(counts))
    with adapter.watched(pipe.vlm, num_tokens + 1):
        return shown([replace(item, vlm_id=vlm_id) for item in pipe.enhance(frames, **arguments)])


def shown(enhancements: list[Any]) -> io.NodeOutput:
    """Output of the nodes here; the descriptions are shown on the node."""
    enhancements = [item.to("cpu") for item in enhancements]
    text = "\n".join(" ".join(item.description.split()) for item in enhancements)
    return io.NodeOutput(enhancements, text, ui=ui.PreviewText(text))


class LegoEnhancePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoEnhancePrompt",
            display_name="LEGO Enhance Prompt",
            category="LEGO/enhance",
            description="The visual LLM looks at the frame and describes how the action is carried out there. "
            "Description and embeddings go on to LEGO Encode Condition.",
            search_aliases=["describe action", "caption", "llava", "lego"],
            inputs=[
                LegoVlmType.Input("lego_vlm", tooltip=VLM_TIP),
                io.Image.Input("image", tooltip=FRAME_TIP),
                io.String.Input("action", default="open drawer", multiline=True, tooltip=ACTION_TIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the sampled description; a script with a generator of this seed gets the same.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, lego_vlm: adapter.VlmHandle, image: torch.Tensor, action: str, seed: int) -> io.NodeOutput:
        actions = lines_of("action", action)
        tokens = lego_vlm.pipe.config["max_new_tokens"]
        return enhanced(lego_vlm, image, tokens, action=actions, generator=torch.Generator().manual_seed(seed))


class LegoEditDescription(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoEditDescription",
            display_name="LEGO Edit Description",
            category="LEGO/enhance",
            description="Takes a description written or corrected by hand instead of a sampled one. The visual LLM "
            "only reads it, with the frame and the action, and gives the embeddings.",
            search_aliases=["teacher forced", "correct description", "lego"],
            inputs=[
                LegoVlmType.Input("lego_vlm", tooltip=VLM_TIP),
                io.Image.Input("image", tooltip=FRAME_TIP),
                io.String.Input("action", default="open drawer", multiline=True, tooltip=ACTION_TIP),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    placeholder="The person pulls the drawer open with the right hand.",
                    tooltip="How the action is carried out: one description, or one on each line. Copy what LEGO "
                    "Enhance Prompt shows and change it.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, lego_vlm: adapter.VlmHandle, image: torch.Tensor, action: str, description: str) -> io.NodeOutput:
        given = {"action": lines_of("action", action), "description": lines_of("description", description)}
        return enhanced(lego_vlm, image, 1, **given)


class LegoSaveEnhancement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoSaveEnhancement",
            display_name="LEGO Save Enhancement",
            category="LEGO/enhance",
            description="As LEGO Enhance Prompt, and keeps frame and description in a cache on disk: what is there is "
            "not computed again, and LEGO Load Enhancement reads it without a VLM. The same cache serves `lego "
            "generate --cache` and training.",
            search_aliases=["cache", "embeddings", "store", "lego"],
            inputs=[
                LegoVlmType.Input("lego_vlm", tooltip=VLM_TIP),
                io.Image.Input("image", tooltip=FRAME_TIP),
                io.String.Input("action", default="open drawer", multiline=True, tooltip=ACTION_TIP),
                io.String.Input(
                    "cache",
                    default="enhancements",
                    tooltip="Name of the cache's folder below output/lego_enhancements; made if it isn't there.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Descriptions written by hand, one on each line. Empty: the VLM describes.",
                ),
            ],
            outputs=[
                *outputs(),
                io.Combo.Output(
                    display_name="cache",
                    tooltip="Name of the cache, for LEGO Load Enhancement in the same workflow.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, cache: str, **_: Any) -> str:
        return adapter.state_of(adapter.cache_folders().get(f"output/{cache.strip()}"), "recipe-*.json")

    @classmethod
    def execute(
        cls, lego_vlm: adapter.VlmHandle, image: torch.Tensor, action: str, cache: str, description: str = ""
    ) -> io.NodeOutput:
        folder = adapter.cache_to_write(cache)
        output = enhanced(
            lego_vlm,
            image,
            lego_vlm.pipe.config["max_new_tokens"],
            action=lines_of("action", action),
            description=lines_of("description", description) if description.strip() else None,
            cache=folder,
        )
        return io.NodeOutput(*output.result, f"output/{folder.name}", ui=output.ui)


class LegoLoadEnhancement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoLoadEnhancement",
            display_name="LEGO Load Enhancement",
            category="LEGO/enhance",
            description="Reads what LEGO Save Enhancement, `lego enhance --cache` or the training script has kept, "
            "found by the frame's pixels and the action. Needs no VLM.",
            search_aliases=["cache", "embeddings", "without vlm", "lego"],
            inputs=[
                io.Image.Input("image", tooltip="The same frame, pixel for pixel, as when it was saved."),
                io.String.Input("action", default="open drawer", multiline=True, tooltip=ACTION_TIP),
                io.Combo.Input(
                    "cache",
                    options=list(adapter.cache_folders()),
                    tooltip="A cache below output/lego_enhancements, input/lego_enhancements or models/lego.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Of entries that were saved with a description of one's own: that description. Empty: the "
                    "sampled one.",
                ),
                io.String.Input(
                    "recipe",
                    default="",
                    optional=True,
                    tooltip="Which VLM and settings, where a cache has several; an error lists them. Usually empty.",
                ),
            ],
            outputs=outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, cache: str = "", **_: Any) -> str:  # nothing is known of a connected cache
        return adapter.state_of(adapter.cache_folders().get(cache), "*.*")

    @classmethod
    def execute(
        cls, image: torch.Tensor, action: str, cache: str, description: str = "", recipe: str = ""
    ) -> io.NodeOutput:
        from lego_pipeline.data.embedding_cache import EmbeddingCache

        folder = adapter.folder_of(cache, adapter.cache_folders(), "cache")
        found = adapter.without_models().enhance(
            to_frames(image),
            lines_of("action", action),
            lines_of("description", description) if description.strip() else None,
            cache=EmbeddingCache(folder, recipe=recipe.strip() or None),
        )
        return shown(found)


NODES = [LegoEnhancePrompt, LegoEditDescription, LegoSaveEnhancement, LegoLoadEnhancement]
