"""Nodes for pictures: encode a frame, bring results back to its size, keep what the action left alone, compare."""

from typing import NamedTuple

import numpy as np
import torch
from comfy_api.latest import io

from lego_pipeline import contact_sheet, images, scene

from . import adapter
from .load import LegoPipelineType

LegoSizeType = io.Custom("LEGO_SIZE")


class FrameSize(NamedTuple):
    """LEGO_SIZE: of a frame before it was resized for the model, in pixels."""

    height: int
    width: int


def to_frames(image: torch.Tensor) -> list[images.Frame]:
    """Frames of an IMAGE (B, H, W, 1 | 3 | 4) float: alpha is cut off, values are clamped to [0, 1].

    Raises:
        ValueError: a frame of less than 8 pixels, or values that aren't finite.
    """
    colours = image[..., :3] if image.shape[-1] > 3 else image.expand(*image.shape[:-1], 3)
    return images.to_frames(colours.float().clamp(0, 1).movedim(-1, 1))


def to_image(frames: list[images.Frame]) -> torch.Tensor:
    """IMAGE (B, H, W, 3) float32 in [0, 1] of PIL frames of one size."""
    return torch.stack([torch.from_numpy(np.array(images.to_pil(frame))) for frame in frames]).float() / 255


def lines_of(name: str, text: str) -> list[str]:
    """The lines of a text widget that hold something.

    Raises:
        ValueError: there are none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(
            f'`{name}` must have a text on at least one line, got none; write for instance "open drawer".'
        )
    return lines


class LegoEncodeFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoEncodeFrame",
            display_name="LEGO Encode Frame",
            category="LEGO/condition",
            description="Resizes the frame to the area that the checkpoint was trained at, keeping its aspect, and "
            "encodes it. LEGO Restore Size brings the result back to the frame's size.",
            search_aliases=["vae encode", "input frame", "lego"],
            inputs=[
                LegoPipelineType.Input("lego_pipeline", tooltip="From LEGO Load Pipeline; it knows the resolution."),
                io.Vae.Input("vae", tooltip="The VAE of LEGO Load Pipeline."),
                io.Image.Input("image", tooltip="Frames of one size, at least 8 pixels. Transparency is cut off."),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side in pixels of the square whose area the model works at. 0: the checkpoint's own.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Empty latents of this size, for the sampler."),
                io.Latent.Output(display_name="image_latent", tooltip="The encoded frame, for LEGO Encode Condition."),
                LegoSizeType.Output(display_name="lego_size", tooltip="The frame's own size, for LEGO Restore Size."),
            ],
        )

    @classmethod
    def execute(
        cls, lego_pipeline: adapter.PipelineHandle, vae: object, image: torch.Tensor, resolution: int
    ) -> io.NodeOutput:
        frames = to_frames(image)
        own = images.frame_size(frames[0])
        factor = adapter.pixels_per_cell(vae)
        size = images.model_size(*own, resolution or lego_pipeline.config["resolution"], factor)
        images.warn_of_enlargement([own], [size], is_resized_back=False)
        pixels = torch.stack([images.to_model_input(frame, *size) for frame in frames])  # (B, 3, H, W)
        latents = adapter.encode(vae, pixels / 2 + 0.5)
        return io.NodeOutput({"samples": torch.zeros_like(latents)}, {"samples": latents}, FrameSize(*own))


class LegoRestoreSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoRestoreSize",
            display_name="LEGO Restore Size",
            category="LEGO/image",
            description="Resizes generated pictures to the size that the frame had before LEGO Encode Frame.",
            search_aliases=["resize back", "lego"],
            inputs=[
                io.Image.Input("image", tooltip="Generated pictures."),
                LegoSizeType.Input("lego_size", tooltip="From LEGO Encode Frame."),
            ],
            outputs=[io.Image.Output(tooltip="The pictures at the frame's size.")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, lego_size: FrameSize) -> io.NodeOutput:
        resized = images.resize(torch.stack([torch.as_tensor(f) for f in to_frames(image)]), *lego_size)
        return io.NodeOutput(resized.movedim(1, -1).contiguous())


class LegoKeepScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoKeepScene",
            display_name="LEGO Keep Scene",
            category="LEGO/image",
            description="Shows the frame's own pixels where the action changed nothing, so that the rest of the scene "
            "stays as sharp as it was. What is new is seen from the latents; the border between both is soft.",
            search_aliases=["composite", "sharp background", "lego"],
            inputs=[
                io.Image.Input("image", tooltip="Generated pictures, after LEGO Restore Size."),
                io.Image.Input("frame", tooltip="The frame that went into LEGO Encode Frame."),
                io.Latent.Input("samples", tooltip="The latents that the pictures were decoded from."),
                io.Latent.Input("image_latent", tooltip="The encoded frame, from LEGO Encode Frame."),
                io.Float.Input(
                    "low",
                    default=0.3,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Up to this change of the latents the frame is kept. 1 is the spread of the frame's own "
                    "latents.",
                ),
                io.Float.Input(
                    "high",
                    default=0.6,
                    min=0.05,
                    max=10.0,
                    step=0.05,
                    tooltip="From this change on the generated picture is shown; between the two they are mixed.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures with the frame's own pixels around what is new.")],
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, frame: torch.Tensor, samples: dict, image_latent: dict, low: float, high: float
    ) -> io.NodeOutput:
        pictures, frames, latents, own = (
            to_frames(image),
            to_frames(frame),
            samples["samples"],
            image_latent["samples"],
        )
        count = len(pictures)
        if low >= high:
            raise ValueError(f"`low` must be less than `high` ({high}), got {low}; 0.3 and 0.6 suit most frames.")
        if latents.shape[1:] != own.shape[1:]:
            raise ValueError(
                f"`image_latent` must be of the size of `samples` {tuple(latents.shape[1:])}, got "
                f"{tuple(own.shape[1:])}; connect the LEGO Encode Frame that the sampler's latents came from."
            )
        for name, number in (("samples", len(latents)), ("frame", len(frames)), ("image_latent", len(own))):
            if number != count and (number != 1 or name == "samples"):
                raise ValueError(
                    f"`{name}` must be as many as the pictures ({count}), got {number}; connect what they come from."
                )
        shares = scene.changed_share(latents, own.expand_as(latents), (low, high))
        kept = []
        for i in range(count):
            picture = torch.as_tensor(pictures[i])
            original = images.to_model_input(frames[i if len(frames) > 1 else 0], *picture.shape[-2:]) / 2 + 0.5
            kept.append(scene.keep_scene_pixels(picture, original, shares[i]))
        return io.NodeOutput(torch.stack(kept).movedim(1, -1).contiguous())


class LegoCompareGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoCompareGrid",
            display_name="LEGO Compare Grid",
            category="LEGO/image",
            description="Draws pictures side by side with captions: one card for each picture of the batch.",
            search_aliases=["contact sheet", "side by side", "lego"],
            inputs=[
                io.Image.Input("image_1", tooltip="First picture of each card; a single one is used in all cards."),
                io.Image.Input("image_2", tooltip="Second picture of each card.", optional=True),
                io.Image.Input("image_3", tooltip="Third picture of each card.", optional=True),
                io.Image.Input("image_4", tooltip="Fourth picture of each card.", optional=True),
                io.String.Input(
                    "captions",
                    default="input\ngenerated",
                    multiline=True,
                    tooltip="Text below each picture, one on each line; lines that are missing stay empty.",
                    optional=True,
                ),
                io.String.Input(
                    "titles",
                    default="",
                    multiline=True,
                    tooltip="Heading of each card, one on each line, for instance the actions.",
                    optional=True,
                ),
                io.String.Input(
                    "texts",
                    default="",
                    multiline=True,
                    tooltip="Text of each card, one on each line, for instance the descriptions.",
                    optional=True,
                ),
                io.Int.Input("columns", default=2, min=1, max=16, tooltip="Cards side by side.", optional=True),
                io.Int.Input(
                    "frame_size",
                    default=256,
                    min=64,
                    max=1024,
                    step=8,
                    tooltip="Side in pixels of the square that each picture is fitted into.",
                    optional=True,
                ),
            ],
            outputs=[io.Image.Output(tooltip="One picture with all cards.")],
        )

    @classmethod
    def execute(
        cls,
        image_1: torch.Tensor,
        image_2: torch.Tensor | None = None,
        image_3: torch.Tensor | None = None,
        image_4: torch.Tensor | None = None,
        captions: str = "",
        titles: str = "",
        texts: str = "",
        columns: int = 2,
        frame_size: int = 256,
    ) -> io.NodeOutput:
        given = [to_frames(image) for image in (image_1, image_2, image_3, image_4) if image is not None]
        count = max(map(len, given))
        for number, frames in enumerate(given, start=1):
            if len(frames) not in (1, count):
                raise ValueError(
                    f"`image_{number}` must have one picture or as many as the others ({count}), got {len(frames)}; "
                    "make the batches equal."
                )
        names, heads, bodies = captions.splitlines(), titles.splitlines(), texts.splitlines()
        cards = []
        for i in range(count):
            pictures = [images.to_pil(frames[i if len(frames) > 1 else 0]) for frames in given]
            labelled = [(_line(names, k), picture) for k, picture in enumerate(pictures)]
            cards.append(contact_sheet.Card(title=_line(heads, i), frames=labelled, text=_line(bodies, i)))
        sheet = contact_sheet.draw_contact_sheet(cards, columns=columns, frame_size=frame_size)
        return io.NodeOutput(to_image([sheet]))


def _line(lines: list[str], number: int) -> str:
    return lines[number] if number < len(lines) else ""


NODES = [LegoEncodeFrame, LegoRestoreSize, LegoKeepScene, LegoCompareGrid]
