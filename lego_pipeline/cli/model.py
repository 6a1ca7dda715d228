"""The flags that name a model, shared by the subcommands that load one, and the loading."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import PIL.Image

    from lego_pipeline import LegoPipeline, LegoPipelineOutput
    from lego_pipeline.data.embedding_cache import EmbeddingCache

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

    def load(self) -> LegoPipeline:
        """The pipeline on its device.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it cannot be loaded, or the device is unknown or absent.
        """
        path = self.find()
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from lego_pipeline import LegoPipeline
        from lego_pipeline.loading import check_device

        if self.device is not None:
            device = check_device(self.device)
        else:
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            pipeline = LegoPipeline.from_pretrained(path, dtype=getattr(torch, self.dtype))
        except OSError as error:
            raise ValueError(f"`--model` {path} cannot be loaded: {error}") from error
        pipeline.set_progress_bar_config(disable=None, leave=False)  # None: only on a terminal
        return pipeline.to(device)

    def fingerprint(self) -> str:
        """16 hex digits that change when a file of a model folder does; for a hub id, the id.

        Size and the first MiB of every file are hashed: a few milliseconds for the embedded checkpoint, well under a
        second for a large one, and training changes every tensor.
        """
        folder = Path(self.find())
        if not folder.is_dir():
            return str(folder)
        digest = hashlib.sha256()
        for file in sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".safetensors", ".txt", ".model")):
            with open(file, "rb") as content:
                digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
                digest.update(content.read(HASHED_BYTES))
        return digest.hexdigest()[:16]


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
