"""`lego convert`: the released checkpoints and data in this package's layout."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lego_pipeline.cli.convert_data import ConvertData


@dataclass(kw_only=True)
class ConvertLdm:
    """A released LDM checkpoint (.ckpt) as a LegoPipeline folder."""

    checkpoint: Path
    """The .ckpt file, or the same tensors as .safetensors. Nothing in it is run."""
    output: Path
    """Folder that is made; one with files in it is refused."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """Folder or hub name with CLIP's tokenizer; a folder may hold the text tower's config, too."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights of the UNet, as the release samples with, or the last ones."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the saved weights."""
    vlm: Path | None = None
    """Folder of the VLM that `lego convert vlm` made, put into the pipeline by links. Its id isn't noted with the
    projections."""
    unet_heads: int = 8
    """Attention heads of the UNet; no tensor tells them."""
    mixer_heads: int = 8
    """Attention heads of the text mixer, likewise."""
    image_tokens: int = 256
    """VLM image tokens of a frame, likewise."""
    text_tokens: int = 77
    """VLM text states that are kept, likewise."""
    scaling_factor: float = 0.18215
    """Of the latents, likewise."""
    resolution: int = 256
    """Side in pixels of the square that the UNet was trained at, likewise."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Convert; 0 when the folder is written."""
        import torch

        from lego_pipeline.convert.ldm import Facts, convert_ldm

        facts = Facts(
            unet_heads=self.unet_heads,
            mixer_heads=self.mixer_heads,
            num_image_tokens=self.image_tokens,
            num_text_tokens=self.text_tokens,
            scaling_factor=self.scaling_factor,
            resolution=self.resolution,
        )
        report = convert_ldm(
            self.checkpoint,
            self.output,
            text_encoder=self.text_encoder,
            weights=self.weights,
            dtype=getattr(torch, self.dtype),
            facts=facts,
            vlm=self.vlm,
        )
        if self.json:
            print(json.dumps({"ok": True, **asdict(report)}))
            return 0
        parts = ", ".join(f"{name} {count:,}" for name, count in report.parameters.items())
        print(f"{report.output}: {report.weights} weights; parameters: {parts}")
        print(
            "Not in the file, so assumed: " + ", ".join(f"{name} {value:g}" for name, value in report.assumed.items())
        )
        print(report.projections_reason)
        return 0


@dataclass(kw_only=True)
class ConvertVlm:
    """A LLaVA folder of the original layout as transformers' LLaVA, weights streamed shard by shard."""

    checkpoint: Path
    """Folder with config.json, .bin or .safetensors shards, and tokenizer. Nothing in them is run."""
    output: Path
    """Folder that is made; one with files in it is refused."""
    vision_tower: str = "openai/clip-vit-large-patch14"
    """Folder or hub name of the CLIP model whose vision tower the VLM sees with."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the saved weights; without it each as it is."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Convert; 0 when the folder is written."""
        import torch

        from lego_pipeline.convert.vlm import convert_vlm

        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        report = convert_vlm(self.checkpoint, self.output, vision_tower=self.vision_tower, dtype=dtype)
        if self.json:
            print(json.dumps({"ok": True, **asdict(report)}))
            return 0
        print(
            f"{report.output}: {report.parameters:,} parameters in {report.shards} files; <image> is token "
            f"{report.image_token_id}, {report.num_image_tokens} of them for a frame"
        )
        if report.vision_difference is not None:
            equal = "equal to" if report.vision_difference == 0 else f"up to {report.vision_difference:.2g} away from"
            print(
                f"The vision tower's weights in the shards are {equal} those of {self.vision_tower}, which were taken."
            )
        return 0


@dataclass(kw_only=True)
class Convert:
    """Bring the released checkpoints and data into this package's layout."""

    what: Annotated[
        Annotated[ConvertLdm, tyro.conf.subcommand("ldm")]
        | Annotated[ConvertVlm, tyro.conf.subcommand("vlm")]
        | Annotated[ConvertData, tyro.conf.subcommand("data")],
        tyro.conf.arg(name=""),
    ]

    @property
    def json(self) -> bool:
        """Whether the result is printed as JSON."""
        return self.what.json

    def run(self) -> int:
        """What the chosen command gives."""
        return self.what.run()
