"""What the baselines have in common: settings that are checked before a model is loaded, and frames of any size.

A baseline is a dataclass. Its fields are its settings, which `lego generate --argument NAME=VALUE` sets; `load` brings
it to a device; `draw` makes pictures. A picture depends on its frame, its text and its generator alone, neither on
the batch nor on the order, as those of LegoPipeline.

Letters: B samples, H, W size in pixels at which the model works.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

COMPONENTS = (
    "unet",
    "vae",
    "text_encoder",
    "tokenizer",
    "scheduler",
)  # of a Stable Diffusion folder, all that is read


class Baseline(ABC):
    """A system that LEGO is compared with; see the module."""

    needs: ClassVar[str] = ""  # the kind of folder that it draws with; empty if none

    @property
    def settings(self) -> dict[str, Any]:
        """All that pictures depend on beside folder, frame, text and seed."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # ty: ignore[invalid-argument-type]

    @abstractmethod
    def load(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        """Brings the model to a device.

        Args:
            folder: in diffusers' layout, or a hub id.
            device, dtype: where and in which number format it runs.

        Raises:
            FileNotFoundError, ValueError: the folder isn't there, or isn't of the kind in `needs`.
        """

    @abstractmethod
    def draw(
        self, frames: Sequence[PIL.Image.Image], texts: Sequence[str], generators: Sequence[torch.Generator]
    ) -> list[PIL.Image.Image]:
        """B pictures of the size of their frames.

        Args:
            frames: B upright RGB frames.
            texts: B labels or descriptions.
            generators: B, on the CPU; a picture draws from its own only.
        """


@dataclass(kw_only=True)
class StableDiffusion(Baseline):
    """A baseline on a Stable Diffusion 1.x or 2.x pipeline.

    A frame is resized to the model's area with its aspect kept, and the picture back to the frame's size, as
    LegoPipeline does. The safety checker isn't loaded: a picture that it blackened would spoil the scores.

    Args:
        num_inference_steps: of the scheduler.
        guidance_scale: of the text.
        resolution: side in pixels of the square whose area the model works at; None takes the UNet's own.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    resolution: int | None = None

    classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    loads: ClassVar[str] = "StableDiffusionPipeline"  # of diffusers
    needs: ClassVar[str] = "a text-to-image folder (Stable Diffusion 1.x or 2.x in diffusers' layout)"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {self.num_inference_steps}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0, got {self.guidance_scale}.")
        if self.resolution is not None and self.resolution < 8:
            raise ValueError(f"`resolution` must be at least 8 pixels, got {self.resolution}.")

    def load(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        check_class(folder, self.classes, self.needs)
        check_components(folder)
        cls = getattr(diffusers, self.loads)
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        pipeline = load_pipeline(cls, folder, dtype, requires_safety_checker=False, **unused)
        latent_channels, in_channels = pipeline.vae.config.latent_channels, pipeline.unet.config.in_channels
        parts = 2 if self.loads == "StableDiffusionInstructPix2PixPipeline" else 1
        if in_channels != parts * latent_channels:
            raise ValueError(
                f"`--model` must be {self.needs}, whose UNet has {parts * latent_channels} input channels, got "
                f"{in_channels} in {folder}; name another folder."
            )
        self.pipeline = pipeline.to(device)

    def draw(
        self, frames: Sequence[PIL.Image.Image], texts: Sequence[str], generators: Sequence[torch.Generator]
    ) -> list[PIL.Image.Image]:
        import torch

        from lego_pipeline import images

        factor = self.pipeline.vae_scale_factor
        resolution = self.resolution or _side(self.pipeline.unet.config.sample_size) * factor
        sizes = [images.model_size(frame.height, frame.width, resolution, factor) for frame in frames]
        images.warn_of_enlargement([(frame.height, frame.width) for frame in frames], sizes, is_resized_back=True)
        results: list[Any] = [None] * len(frames)
        for size in dict.fromkeys(sizes):
            rows = [i for i, other in enumerate(sizes) if other == size]
            inputs = torch.stack([images.to_model_input(frames[i], *size) for i in rows])  # (B, 3, H, W)
            with torch.no_grad():
                drawn = self.draw_inputs(inputs, [texts[i] for i in rows], [generators[i] for i in rows])
            own_sizes = [(frames[i].height, frames[i].width) for i in rows]
            for i, picture in zip(rows, images.from_model_output(drawn, own_sizes), strict=True):
                results[i] = images.to_pil(picture)
        return results

    @abstractmethod
    def draw_inputs(self, inputs: torch.Tensor, texts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from frames of one size, likewise."""

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Latents (B, c, h, w) of frames (B, 3, H, W) in [-1, 1]: mode of the posterior, scaled for the UNet."""
        vae = self.pipeline.vae
        return vae.encode(inputs.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of latents of the UNet's scale."""
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def class_of(folder: str, needs: str) -> str | None:
    """Name of the pipeline class that a folder, or a repository of the model hub, was saved from.

    Args:
        needs: what the folder should be, for the message.

    Raises:
        FileNotFoundError: there is no folder in diffusers' layout.
    """
    from pathlib import Path

    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from lego_pipeline.loading import is_local

    try:
        if is_local(folder) and not (Path(folder) / "model_index.json").is_file():
            raise OSError
        config: Any = DiffusionPipeline.load_config(folder)
    except OSError as error:
        raise FileNotFoundError(
            f"`--model` must be {needs}, but there is no readable model_index.json at {folder}; name a folder that "
            "`save_pretrained` of diffusers wrote, or a hub id."
        ) from error
    return config.get("_class_name")


def check_class(folder: str, classes: Sequence[str], needs: str) -> None:
    """Refuses a folder that was saved from another pipeline class.

    Raises:
        FileNotFoundError: there is no folder in diffusers' layout.
        ValueError: another class.
    """
    found = class_of(folder, needs)
    if found not in classes:
        raise ValueError(f"`--model` must be {needs}, got a {found} at {folder}; name another folder.")


def check_components(folder: str) -> None:
    """Refuses a local Stable Diffusion folder that lacks a file or has one that is cut off."""
    from pathlib import Path

    from lego_pipeline.loading import check_component

    if Path(folder).is_dir():
        for component in COMPONENTS:
            check_component(Path(folder) / component)


def load_pipeline(cls: Any, folder: str, dtype: torch.dtype, **components: Any) -> DiffusionPipeline:
    """A diffusers pipeline of a folder, its bars hidden; no code of the folder is run.

    Raises:
        ValueError: it can't be loaded.
    """
    try:
        pipeline = cls.from_pretrained(folder, dtype=dtype, **components)
    except OSError as error:
        raise ValueError(f"`--model` {folder} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_arguments(cls: type[Baseline], arguments: Mapping[str, Any]) -> Baseline:
    """A baseline with settings by name.

    Raises:
        ValueError: an unknown name, or a value of another type or out of range.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # ty: ignore[invalid-argument-type]
    for name, value in arguments.items():
        if name not in names:
            raise ValueError(f"`--argument` must be one of {', '.join(names) or 'none'}, got {name}; leave it out.")
        kinds = get_args(hints[name]) or (hints[name],)
        # A Literal's choices are checked by the baseline; a whole number is a float too.
        is_choice = all(isinstance(kind, str) for kind in kinds)
        fits = value in kinds if is_choice else isinstance(value, kinds + (int,) * (float in kinds))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            spelt = " or ".join(kind if isinstance(kind, str) else kind.__name__ for kind in kinds)
            raise ValueError(f"`{name}` must be {spelt}, got {value!r}; write --argument {name}=VALUE.")
    return cls(**arguments)


def _side(sample_size: int | Sequence[int]) -> int:
    """Side in latent cells of the square of a UNet's own area."""
    if isinstance(sample_size, int):
        return sample_size
    return round(math.sqrt(math.prod(sample_size)))
