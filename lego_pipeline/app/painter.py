"""What the page asks of a loaded model: a description to be read and edited, pictures, storyboards.

Every picture comes from a generator of its own seed, and its record has what `lego generate` needs to paint it again.
The VLM's work on a frame goes through the pipeline's cache, so that a second action, an edited description or another
seed costs no vision pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lego_pipeline import __version__
from lego_pipeline.app.drift import difference
from lego_pipeline.app.results import Picture, Run, file_name
from lego_pipeline.checks import check_choice
from lego_pipeline.images import read_image
from lego_pipeline.storyboard import FOLLOW

if TYPE_CHECKING:
    from lego_pipeline import LegoPipeline
    from lego_pipeline.data.embedding_cache import EmbeddingCache
    from lego_pipeline.vlm import Enhancement

OnStep = Callable[[int, int], bool]  # steps done and steps in all; False stops the picture
Watch = Callable[[float, str], bool]  # share of the whole that is done, and what is being done; False stops


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The advanced settings of a picture; None takes the model's own.

    Attributes:
        steps: denoising steps.
        guidance_scale: how strongly the action is followed.
        image_guidance_scale: how strongly the frame is kept.
        keep_scene: show the frame's own pixels where nothing changes, if the model does.
        fast: paint with the few-step adapters.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    keep_scene: bool = True
    fast: bool = False


class Painter:
    """A model that is loaded once and asked by all visitors, one at a time.

    Args:
        pipeline: the model.
        model: what records call it.
        cache: of the VLM's work.
        requests: what the records' `request` says of the model, such as its fingerprint: without and with the few-step
            adapters.
        load_fast: gives the few-step pipeline; None if the model has no such adapters.
    """

    def __init__(
        self,
        pipeline: "LegoPipeline",
        *,
        model: str,
        cache: "EmbeddingCache",
        requests: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
        load_fast: "Callable[[LegoPipeline], LegoPipeline] | None" = None,
    ):
        self.pipeline, self.model, self.cache, self.requests = pipeline, model, cache, requests
        self._load_fast, self._fast = load_fast, None

    @property
    def has_vlm(self) -> bool:
        """Whether the model can describe an action itself."""
        return self.pipeline.vlm is not None and self.pipeline.vlm_processor is not None

    @property
    def has_fast(self) -> bool:
        """Whether the model has few-step adapters."""
        return self._load_fast is not None

    @property
    def keeps_scene(self) -> bool:
        """Whether the model shows the frame's own pixels where nothing changes."""
        return bool(self.pipeline.config["keep_scene"])

    def defaults(self, *, fast: bool = False) -> Settings:
        """The settings that a picture gets where nothing is asked for."""
        own = self._pipeline(fast).config
        return Settings(
            steps=own["num_inference_steps"],
            guidance_scale=own["guidance_scale"],
            image_guidance_scale=own["image_guidance_scale"],
            keep_scene=self.keeps_scene,
            fast=fast,
        )

    def most_steps(self, *, fast: bool = False) -> int:
        """How many steps can be asked for: a few-step scheduler knows no more than its teacher had."""
        return self._pipeline(fast).scheduler.config.get("original_inference_steps") or 200

    @torch.no_grad()
    def describe(self, frame: Path, action: str) -> str:
        """The VLM's description of how an action is carried out in a frame, always the same for the two.

        Raises:
            ValueError: the file is no picture, the action is empty, or there is no VLM.
        """
        image, action = read_image(frame), checked_action(action)
        if not self.has_vlm:
            raise ValueError("This model has no visual LLM that could describe the action; write the description.")
        return self.pipeline.enhance(image, action, cache=self.cache)[0].description

    @torch.no_grad()
    def paint(
        self,
        frame: Path,
        action: str,
        description: str,
        seed: int,
        settings: Settings,
        on_step: OnStep | None = None,
        name: str | None = None,
    ) -> Picture | None:
        """One picture.

        Args:
            frame: file of the input frame.
            action: such as "open drawer".
            description: to paint from; if empty the VLM's, and without a VLM the action itself.
            seed: of the noise.
            settings: see `Settings`.
            on_step: told of every step.
            name: id of the record.

        Returns:
            The picture with its record, or None if `on_step` stopped it.

        Raises:
            ValueError, TypeError, RuntimeError: an input breaks its rule, or the model fails.
        """
        action, description = checked_action(action), description.strip()
        if not 0 <= seed < 2**63:
            raise ValueError(f"The seed must be a whole number from 0 to 2**63 - 1, got {seed}.")
        image, pipeline, stopped = read_image(frame), self._pipeline(settings.fast), False
        enhancement: Enhancement | None = None
        if self.has_vlm:
            [enhancement] = pipeline.enhance(image, action, description or None, cache=self.cache)
            description = enhancement.description

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal stopped
            if on_step is not None and not on_step(step + 1, pipe.num_timesteps):
                stopped = pipe._interrupt = True
            return {}

        output: Any = pipeline(
            image,
            enhancement=enhancement,
            description=None if enhancement else description or action,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            keep_scene=None if settings.keep_scene else False,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_step,
        )
        if stopped:
            return None
        used = self.defaults(fast=settings.fast)
        record = {
            "id": name or file_name(action, seed),
            "image": frame.name,
            "action": action,
            "description": output.descriptions[0],
            "seed": seed,
            "steps": given(settings.steps, used.steps),
            "guidance_scale": given(settings.guidance_scale, used.guidance_scale),
            "image_guidance_scale": given(settings.image_guidance_scale, used.image_guidance_scale),
            "keep_scene": settings.keep_scene and self.keeps_scene,
            "model": f"{self.model}{' --fast' if settings.fast else ''}",
            "version": __version__,
            "request": self.requests[settings.fast],
        }
        return Picture(image=output.images[0], record=record)

    def paint_seeds(
        self,
        run: Run,
        action: str,
        description: str,
        seed: int,
        count: int,
        settings: Settings,
        watch: Watch = lambda share, text: True,
    ) -> Iterator[Run]:
        """Pictures of one action from `count` seeds in a row; each is written before the next is begun.

        Args:
            run: with the frame; its files grow.
            action, description, settings: as for `paint`.
            seed: of the first picture.
            count: how many.
            watch: told how far the whole is; False stops it.

        Yields:
            The run after each picture.

        Raises:
            As `paint`.
        """
        for k in range(count):
            step = _steps_of(k, count, f"picture {k + 1} of {count}", watch)
            picture = self.paint(run.frame, action, description, seed + k, settings, step) if step(0, 1) else None
            if picture is None:
                return
            description = picture.record["description"]
            run.add(picture)
            yield run

    def paint_storyboard(
        self,
        run: Run,
        actions: Sequence[str],
        seed: int,
        settings: Settings,
        follow: str = "previous",
        watch: Watch = lambda share, text: True,
    ) -> Iterator[Run]:
        """Several actions in a row from a single frame; each picture is written before the next is begun.

        All have the same seed, and a record names the file that its picture was painted from.

        Args:
            run: with the first frame; its files and its drift grow.
            actions: in their order.
            seed, settings: as for `paint`.
            follow: "previous", each picture is the frame of the next action, or "first", all start from the frame.
            watch: told how far the whole is; False stops it.

        Yields:
            The run after each picture.

        Raises:
            ValueError: an unknown `follow`; besides as `paint`.
        """
        check_choice("follow", follow, FOLLOW)
        first = source = read_image(run.frame)
        path = run.frame
        for k, action in enumerate(actions):
            step = _steps_of(k, len(actions), action, watch)
            name = f"{k + 1:02d}-{file_name(action)}"
            picture = self.paint(path, action, "", seed, settings, step, name) if step(0, 1) else None
            if picture is None:
                return
            written = run.add(picture)
            run.drift.append({"first": difference(first, picture.image), "source": difference(source, picture.image)})
            if follow == "previous":
                path, source = written, picture.image
            yield run

    def _pipeline(self, fast: bool) -> "LegoPipeline":
        """The pipeline, or the few-step one, which is loaded when it is first asked for."""
        if not fast:
            return self.pipeline
        if self._load_fast is None:
            raise ValueError("This model has no few-step adapters; paint without them.")
        if self._fast is None:
            self._fast = self._load_fast(self.pipeline)
        return self._fast


def checked_action(action: str | None) -> str:
    """The action without spaces around it.

    Raises:
        ValueError: there is none.
    """
    if not (action or "").strip():
        raise ValueError('Type or pick an action first, such as "open drawer".')
    return (action or "").strip()


def given(value: float | None, default: float | None) -> float | None:
    """What was asked for, or the model's own."""
    return default if value is None else value


def _steps_of(number: int, count: int, text: str, watch: Watch) -> OnStep:
    """What `paint` tells of one picture, told on as a share of `count` pictures."""
    return lambda step, steps: watch(
        (number + step / steps) / count, f"{text}, step {step} of {steps}" if step else text
    )
