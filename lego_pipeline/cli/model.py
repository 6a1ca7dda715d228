"""The flags that name a model, shared by the subcommands that load one, and the loading."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lego_pipeline.checkpoints import FAST

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from lego_pipeline import LegoPipeline, LegoPipelineOutput
    from lego_pipeline.data.embedding_cache import EmbeddingCache

HASHED = (".bin", ".json", ".safetensors", ".txt", ".model")
HASHED_BYTES = 1 << 20  # of the start of each file


@dataclass(kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str | None = None
    """LegoPipeline folder or hub id; without it the embedded rendered kitchen."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; without it the first accelerator, or the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of all components."""

    def find(self) -> str:
        """The folder or hub id that is loaded.

        Raises:
            FileNotFoundError: the embedded checkpoint is asked for and not there.
        """
        from lego_pipeline.checkpoints import KITCHEN

        if self.model is not None:
            return self.model
        if not (KITCHEN / "model_index.json").is_file():
            raise FileNotFoundError(
                f"the embedded checkpoint is not at {KITCHEN}; install the package again, make it with "
                "`make kitchen ARGS=--export`, or name another with `--model`."
            )
        return str(KITCHEN)

    def load(self, **components: Any) -> LegoPipeline:
        """The pipeline on its device.

        Args:
            **components: to be used instead of the model's own, such as `vlm=None`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it cannot be loaded, or the device is unknown or absent.
        """
        path = self.find()
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from lego_pipeline import LegoPipeline

        device = self.find_device()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            pipeline = LegoPipeline.from_pretrained(path, dtype=getattr(torch, self.dtype), **components)
        except OSError as error:
            raise ValueError(f"`--model` {path} cannot be loaded: {error}") from error
        pipeline.set_progress_bar_config(disable=None, leave=False)  # None: only on a terminal
        return pipeline.to(device)

    def find_device(self) -> torch.device:
        """The device that is asked for, or the first accelerator, or the CPU.

        Raises:
            ValueError: the device is unknown or absent.
        """
        import torch

        from lego_pipeline.loading import check_device

        if self.device is not None:
            return check_device(self.device)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def fingerprint(self) -> str:
        """16 hex digits that change when a file of a model folder does; for a hub id, the id.

        Size and the first MiB of every file are hashed: a few milliseconds for the embedded checkpoint, well under a
        second for a large one, and training changes every tensor.
        """
        folder = Path(self.find())
        if not folder.is_dir():
            return str(folder)
        digest = hashlib.sha256()
        files = (file for file in folder.rglob("*") if file.suffix in HASHED)
        for file in sorted(file for file in files if self.is_used(file.relative_to(folder))):
            with open(file, "rb") as content:
                digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
                digest.update(content.read(HASHED_BYTES))
        return digest.hexdigest()[:16]

    def is_used(self, file: Path) -> bool:
        """Whether a file, by its path in the model folder, has a part in what the command makes."""
        return file.parts[0] != FAST


@dataclass(kw_only=True)
class DrawOptions(ModelOptions):
    """Which model, where it runs, and whether it draws in few steps."""

    fast: bool = False
    """Draw with the model's few-step adapters, if it has them: guidance is in their weights, a step is one pass."""

    def load(self, **components: Any) -> LegoPipeline:
        """As `ModelOptions.load`; with `--fast` the few-step pipeline.

        Raises:
            FileNotFoundError: besides, the model has no few-step adapters.
        """
        if not self.fast:
            return super().load(**components)
        folder = self.fast_folder()
        return super().load(**components).load_fast(folder)

    def is_used(self, file: Path) -> bool:
        """As `ModelOptions.is_used`; with `--fast` the adapters too."""
        return self.fast or super().is_used(file)

    def fast_folder(self) -> Path:
        """Where the model's few-step adapters are.

        Raises:
            FileNotFoundError: it has none, or is no folder.
        """
        from lego_pipeline import fast

        folder = Path(self.find()) / FAST
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"`--fast` needs a model folder of this machine, got {folder.parent}; download it and pass the folder."
            )
        if not (folder / fast.FACTS).is_file():
            raise FileNotFoundError(
                f"`--fast` needs few-step adapters, but there are none at {folder}; leave it out, or make them with "
                "train/distill_ldm.py and copy its `lora` there."
            )
        return folder

    def check_steps(self, steps: int | None) -> None:
        """The rule for a number of steps that a command was given.

        Raises:
            ValueError: it is below 1, or with `--fast` more than the adapters' scheduler knows.
            FileNotFoundError: with `--fast` there are no adapters.
        """
        if steps is None:
            return
        if steps < 1:
            raise ValueError(f"`--steps` must be at least 1, got {steps}.")
        if self.fast:
            from diffusers.schedulers.scheduling_lcm import LCMScheduler

            most = LCMScheduler.from_pretrained(self.fast_folder()).config["original_inference_steps"]
            if steps > most:
                raise ValueError(f"`--steps` must be at most {most} with `--fast`, got {steps}.")

    def check_scales(self, guidance_scale: float | None, image_guidance_scale: float | None) -> None:
        """The rule for guidance scales that a command was given.

        Raises:
            ValueError: one is below zero or not finite, or given with `--fast`.
        """
        scales = {"--guidance-scale": guidance_scale, "--image-guidance-scale": image_guidance_scale}
        for flag, scale in scales.items():
            if scale is not None and not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"`{flag}` must be a finite number of at least 0, got {scale}.")
            if scale is not None and self.fast:
                raise ValueError(
                    f"`{flag}` must be left out with `--fast`, got {scale}; the adapters have the guidance in their "
                    "weights."
                )


def open_cache(folder: Path | None) -> EmbeddingCache | None:
    """The cache of descriptions and embeddings in a folder, which is made when something is added.

    Raises:
        NotADirectoryError: there is a file of this name.
        ValueError: a file of the cache is damaged.
    """
    if folder is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`--cache` must be a folder, but {folder} is a file.")

    from lego_pipeline.data.embedding_cache import EmbeddingCache

    return EmbeddingCache(folder)


def draw(pipeline: LegoPipeline, **inputs: Any) -> tuple[list[PIL.Image.Image], list[str]]:
    """Pictures and descriptions of one call of the pipeline, which is given neither embeddings nor an output type."""
    result = cast("LegoPipelineOutput", pipeline(**inputs))
    return cast("list[PIL.Image.Image]", result.images), result.descriptions or []
