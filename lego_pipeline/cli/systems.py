"""`lego generate --system`: LEGO, its label-only twin and the baselines, drawn by the same flags.

A system gets the same frames, seeds, batches, processes and PNG files as LEGO; what differs is the model, the text
and the settings. The baselines are `lego_pipeline.baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from lego_pipeline.cli.model import DrawOptions, ModelOptions, draw

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from lego_pipeline import LegoPipeline
    from lego_pipeline.baselines import Baseline
    from lego_pipeline.data.embedding_cache import EmbeddingCache

System = Literal["lego", "label-only", "copy", "instruct-pix2pix", "sdedit", "proxedit", "diffusers"]
Parts = Literal["label", "description", "description+image", "description+text", "description+image+text"]
SCALES = {  # flags, and what pipelines call them
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "image_guidance_scale": "image_guidance_scale",
}
WRITER = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "projector")  # what writing a description lacks


@dataclass(kw_only=True)
class SystemOptions(DrawOptions):
    """Which system draws, and its settings."""

    system: System = "lego"
    """LEGO, or what it is compared with: label-only (a LegoPipeline by the bare label), copy (the input itself),
    instruct-pix2pix, sdedit and proxedit (on a text-to-image folder), diffusers (any edit pipeline). --model names
    the folder."""
    parts: Parts | None = None
    """What of LEGO's condition is used, the rest is zero: an ablation at inference; without it all of it."""
    argument: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Further setting of a baseline, such as --argument strength=0.6; may be repeated."""
    descriptions: Literal["generate", "manifest"] | None = None
    """Texts of a manifest's rows: the VLM's own descriptions or the manifest's. Without it LEGO has the VLM's own (the
    manifest's with imported features and with --parity paper), a baseline the label."""
    describer: str | None = None
    """LegoPipeline whose VLM writes a baseline's --descriptions generate; without it the embedded kitchen's."""
    steps: int | None = None
    """Denoising steps; without it the model's own number."""
    guidance_scale: float | None = None
    """How strongly the action is followed; without it the model's own."""
    image_guidance_scale: float | None = None
    """How strongly the input frame is kept; without it the model's own."""
    no_keep_scene: bool = False
    """Decode the whole picture, also with a model that shows the input's own pixels where nothing changes."""

    @property
    def is_lego(self) -> bool:
        """Whether a LegoPipeline draws."""
        return self.system in ("lego", "label-only")

    @property
    def used_parts(self) -> Parts | None:
        """What of a LegoPipeline's condition is used; None for all."""
        return "label" if self.system == "label-only" else self.parts

    @property
    def default_texts(self) -> str:
        """Where a manifest's texts come from without `--descriptions`, other than with imported features."""
        return "generate" if self.is_lego and self.used_parts != "label" else "label"

    @property
    def model_name(self) -> str:
        """As records have it."""
        if self.system == "copy":
            return "none"
        return f"{self.model or 'kitchen'}{' --fast' if self.fast else ''}"

    def check_system(self, cache: Any = None) -> None:
        """Refuse what the system doesn't have, before a model is loaded.

        Args:
            cache: that the command was given.

        Raises:
            ValueError, FileNotFoundError: naming the flag.
        """
        self.check_steps(self.steps)
        self.check_scales(self.guidance_scale, self.image_guidance_scale)
        if self.used_parts == "label" and self.descriptions is not None:
            raise ValueError("`--descriptions` must be left out where only the label is used, got a source of them.")
        if self.is_lego:
            if self.system == "label-only" and self.parts is not None:
                raise ValueError(f"`--parts` must be left out with `--system label-only`, got {self.parts}.")
            for flag, value in {"--argument": self.argument, "--describer": self.describer}.items():
                if value:
                    raise ValueError(f"`{flag}` must be left out with `--system {self.system}`, got {value}.")
            if self.used_parts == "label" and cache is not None:
                raise ValueError("`--cache` must be left out where only the label is used, which needs no embeddings.")
            return
        for flag, value in {"--parts": self.parts, "--fast": self.fast, "--no-keep-scene": self.no_keep_scene}.items():
            if value:
                raise ValueError(
                    f"`{flag}` must be left out with `--system {self.system}`, got {value}; it is LEGO's."
                )
        if self.descriptions != "generate":
            for flag, value in {"--cache": cache, "--describer": self.describer}.items():
                if value is not None:
                    raise ValueError(
                        f"`{flag}` must go with `--descriptions generate` with `--system {self.system}`, got {value}."
                    )
        needs = self.baseline.needs  # its settings are checked
        if self.system == "copy":
            if self.model is not None:
                raise ValueError(f"`--model` must be left out with `--system copy`, which has none, got {self.model}.")
        elif self.model is None:
            raise ValueError(f"`--model` must be given with `--system {self.system}`: {needs}.")

    @cached_property
    def baseline(self) -> Baseline:
        """The baseline with its settings, not loaded.

        Raises:
            ValueError: a setting that it doesn't have, or a value that doesn't fit.
        """
        import yaml

        from lego_pipeline.baselines import BASELINES, with_arguments

        cls = BASELINES[self.system]
        arguments: dict[str, Any] = {}
        for text in self.argument:
            name, found, value = text.partition("=")
            if not (found and name.isidentifier()):
                raise ValueError(f"`--argument` must be written NAME=VALUE, got {text!r}.")
            try:
                arguments[name] = yaml.safe_load(value) if value else ""  # `source_prompt=` is the empty text
            except yaml.YAMLError as error:
                raise ValueError(f"`--argument` {name} must have a value as YAML has it, got {value!r}.") from error
            if not _is_plain(arguments[name]):
                raise ValueError(f"`--argument` {name} must be a number or a text, or a list of them, got {value!r}.")
        for flag, name in SCALES.items():
            value = getattr(self, flag)
            if value is None:
                continue
            if name in arguments:
                raise ValueError(f"`--argument {name}` must be left out beside `--{flag.replace('_', '-')}`.")
            if self.system != "diffusers" and name not in cls().settings:
                raise ValueError(f"`--{flag.replace('_', '-')}` must be left out with `--system {self.system}`.")
            arguments[name] = value
        return cls(**arguments) if self.system == "diffusers" else with_arguments(cls, arguments)

    def system_settings(self) -> dict[str, Any]:
        """What all pictures depend on beside their own row; the model's own settings are in its fingerprint."""
        if self.is_lego:
            return {
                "model": self.fingerprint(),
                "dtype": self.dtype,
                "steps": self.steps,
                "guidance_scale": self.guidance_scale,
                "image_guidance_scale": self.image_guidance_scale,
                **({"keep_scene": False} if self.no_keep_scene else {}),
                **({"parts": self.used_parts} if self.used_parts else {}),
            }
        settings: dict[str, Any] = {"system": self.system, "arguments": self.baseline.settings}
        if self.system != "copy":
            settings |= {"model": self.fingerprint(), "dtype": self.dtype}
        if self.descriptions == "generate":
            settings["describer"] = ModelOptions(model=self.describer).fingerprint()
        return settings

    def facts(self, system: LegoPipeline | Baseline) -> dict[str, Any]:
        """Steps and scales for the record of a picture, None where the system has none; and the system's name."""
        if self.is_lego:
            own = cast("LegoPipeline", system).config
            found = {flag: own[name] for flag, name in SCALES.items()}
            given = {flag: getattr(self, flag) for flag in SCALES if getattr(self, flag) is not None}
            return {**found, **given, "system": self.system, **({"parts": self.used_parts} if self.used_parts else {})}
        settings = self.baseline.settings
        others = {name: value for name, value in settings.items() if name not in SCALES.values()}
        return {
            **{flag: settings.get(name) for flag, name in SCALES.items()},
            "system": self.system,
            "arguments": others,
        }

    def open(self, **components: Any) -> LegoPipeline | Baseline:
        """The system on its device.

        Args:
            **components: of a LegoPipeline, to be used instead of the model's own.

        Raises:
            FileNotFoundError, ValueError: its model can't be loaded.
        """
        if self.is_lego:
            if self.used_parts == "label":
                components |= {"vlm": None, "vlm_processor": None}
            return self.load(**components)
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        if self.descriptions == "generate":
            _ = self._writer  # loaded here, so that a bad one is refused before anything is drawn
        if self.system != "copy":  # whose model is none
            self.baseline.load(str(self.model), self.find_device(), getattr(torch, self.dtype))
        return self.baseline

    @cached_property
    def _writer(self) -> LegoPipeline:
        """The pipeline that writes a baseline's descriptions, without what it doesn't need for that."""
        options = ModelOptions(model=self.describer, device=self.device, dtype=self.dtype)
        writer = options.load(**dict.fromkeys(WRITER))
        if writer.vlm is None:
            raise ValueError(f"`--describer` must be a LegoPipeline with its VLM, got {options.find()} without.")
        return writer

    def draw_pictures(
        self,
        system: LegoPipeline | Baseline,
        frames: Sequence[PIL.Image.Image],
        action: list[str] | None,
        description: list[str] | None,
        generators: list[torch.Generator],
        cache: EmbeddingCache | None,
    ) -> tuple[list[PIL.Image.Image], list[str]]:
        """Pictures of some frames and the texts that they were drawn from, each from its own generator.

        Args:
            system: from `open`.
            frames: B upright RGB frames.
            action, description: B each, or None; `description` goes before `action`.
            generators: B.
            cache: of descriptions and embeddings.
        """
        if not self.is_lego:
            texts = description or action or []
            if self.descriptions == "generate":
                made = self._writer.enhance(list(frames), action, description, generators, cache)
                texts = [item.description for item in made]
            return cast("Baseline", system).draw(frames, texts, generators), texts
        pipeline = cast("LegoPipeline", system)
        inputs: dict[str, Any] = {"action": action, "description": description, "cache": cache}
        if self.used_parts is not None:
            inputs, texts = self._part_of_the_condition(pipeline, frames, generators, **inputs)
        pictures, descriptions = draw(
            pipeline,
            image=list(frames),
            **inputs,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            keep_scene=False if self.no_keep_scene else None,  # None takes the model's own
            generator=generators,
        )
        return pictures, descriptions if self.used_parts is None else texts

    def _part_of_the_condition(
        self,
        pipeline: LegoPipeline,
        frames: Sequence[PIL.Image.Image],
        generators: list[torch.Generator],
        action: list[str] | None,
        description: list[str] | None,
        cache: EmbeddingCache | None,
    ) -> tuple[dict[str, Any], list[str]]:
        """What a call gets instead of action and description, and the texts in it."""
        import torch

        from lego_pipeline.baselines.parts import condition_of_parts

        assert self.used_parts is not None
        with torch.no_grad():
            condition, texts = condition_of_parts(
                pipeline, self.used_parts, frames, action, description, generators, cache, self.checks_vlm
            )
        return {"prompt_embeds": condition}, texts

    @property
    def checks_vlm(self) -> bool:
        """Whether embeddings have to be of the VLM that the checkpoint was trained with."""
        return True


def _is_plain(value: Any) -> bool:
    """Whether a value comes back from a record as it went in; a date, a set or NaN doesn't."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
