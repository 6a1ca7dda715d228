"""Any edit pipeline of diffusers, by its folder: what takes a picture and a text and gives a picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lego_pipeline.baselines.base import Baseline, class_of, load_pipeline

if TYPE_CHECKING:
    import PIL.Image
    import torch

OWN = ("self", "image", "prompt", "generator", "output_type", "return_dict")  # given by `draw`


class EditPipeline(Baseline):
    """A diffusers pipeline whose call takes `image` and `prompt`, one sample at a time.

    Args:
        **arguments: handed to the call, such as num_inference_steps, guidance_scale, true_cfg_scale or strength; what
            isn't given is the pipeline's own default. Names that the call doesn't have are refused after loading.

    The frame is given as it is, or in the area of `resolution` pixels squared if that is among the arguments. The
    picture is brought to the frame's size. A safety checker that the folder has stays: a picture that it refuses
    fails.
    """

    needs: ClassVar[str] = "the folder of a diffusers pipeline that edits pictures"

    def __init__(self, /, resolution: int | None = None, **arguments: Any):
        taken = sorted(set(arguments) & set(OWN))
        if taken:
            raise ValueError(f"`--argument` must not be one of {', '.join(OWN)}, got {', '.join(taken)}.")
        if resolution is not None and not (isinstance(resolution, int) and resolution >= 8):
            raise ValueError(f"`resolution` must be a whole number of at least 8 pixels, got {resolution!r}.")
        self.resolution, self.arguments = resolution, arguments

    @property
    def settings(self) -> dict[str, Any]:
        return {"resolution": self.resolution, **self.arguments}

    def load(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        import diffusers

        name = class_of(folder, self.needs)
        cls = getattr(diffusers, name, None) if isinstance(name, str) else None
        if cls is None:
            advice = "use --system lego" if name == "LegoPipeline" else "name another folder"
            raise ValueError(f"`--model` must be of a pipeline that diffusers has, got {name} at {folder}; {advice}.")
        known = inspect.signature(cls.__call__).parameters
        if not {"image", "prompt"} <= set(known):
            raise ValueError(
                f"`--model` must be {self.needs}, whose call takes `image` and `prompt`, got {name}, which takes "
                f"{', '.join(list(known)[1:6])}, ...; name another folder."
            )
        unknown = sorted(set(self.arguments) - set(known))
        if unknown:
            raise ValueError(f"`--argument` must be one that {name} takes, got {', '.join(unknown)}; leave it out.")
        self.takes = known
        self.pipeline: Any = load_pipeline(cls, folder, dtype).to(device)

    def draw(
        self, frames: Sequence[PIL.Image.Image], texts: Sequence[str], generators: Sequence[torch.Generator]
    ) -> list[PIL.Image.Image]:
        return [self._draw_one(*sample) for sample in zip(frames, texts, generators, strict=True)]

    def _draw_one(self, frame: PIL.Image.Image, text: str, generator: torch.Generator) -> PIL.Image.Image:
        import PIL.Image
        import torch

        from lego_pipeline import images

        given = frame
        if self.resolution is not None:
            height, width = images.model_size(frame.height, frame.width, self.resolution, 16)
            given = frame.resize((width, height), PIL.Image.Resampling.BICUBIC)
        own = {"generator": generator} if "generator" in self.takes else {}
        with torch.no_grad():
            output = self.pipeline(image=given, prompt=text, **own, **self.arguments)
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise ValueError("the pipeline's safety checker must let the picture pass, but it blackened it.")
        if not getattr(output, "images", None):
            raise ValueError(f"`--model` must be {self.needs}, but a call gave no picture; name another folder.")
        picture = images.to_rgb(output.images[0])
        return picture if picture.size == frame.size else picture.resize(frame.size, PIL.Image.Resampling.BICUBIC)
