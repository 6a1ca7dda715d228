"""How pictures of a manifest are drawn and stored: `Plain`, the default, and `Paper`, as the release does it.

Both know where a row's picture goes, which random numbers are its own, how it is drawn, and whether a picture that is
there is whole. Neither depends on the batch or on the process.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lego_pipeline.cli import records
from lego_pipeline.cli.jobs import texts_of
from lego_pipeline.cli.samples import derive_seed

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset

    from lego_pipeline import LegoPipeline
    from lego_pipeline.cli.generate import Generate
    from lego_pipeline.cli.jobs import Job
    from lego_pipeline.data.embedding_cache import EmbeddingCache


class Plain:
    """PNG files `<id>.png` with parameters, of the frame's own size, a seed for each row.

    Args:
        options: of the command.
        rows: of the manifest, images undecoded.
    """

    columns: tuple[str, ...] = ()  # that every row has to fill, beside those of all manifests

    def __init__(self, options: Generate, rows: Dataset):
        self.options, self.rows = options, rows
        self.folder = options.output  # of generation.jsonl

    def path(self, row: dict[str, Any]) -> PurePosixPath:
        """Of a row's picture, below the output folder."""
        return PurePosixPath(f"{row['id']}.png")

    def facts(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """What the random numbers of a row depend on."""
        return {"seed": derive_seed(self.options.seed, row["id"])}

    def record_of(self, path: Path, known: dict[str, Any] | None) -> dict[str, Any] | None:
        """The record of a picture that is there as it was written, else None; `known` is that of generation.jsonl."""
        return records.read_png_record(path)

    def prepare(self, pipeline: LegoPipeline) -> None:
        """Make a pipeline ready that was loaded."""

    def start(self, numbers: Sequence[int]) -> None:
        """Make ready for a batch, the rows of these numbers; batches come in turn."""

    def draw(
        self,
        pipeline: LegoPipeline,
        cache: EmbeddingCache | None,
        jobs: Sequence[Job],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """Draw and write the pictures of some rows of the batch in one call, and note their records."""
        self.options.draw_batch(pipeline, cache, jobs, [read_frame(row) for row in rows])


class Paper(Plain):
    """The released tree: squeezed frames, the release's sampler, stretched JPEGs, a seed for each eighth of the rows.

    Args: as `Plain`; steps and image guidance scale are in the folder's name and have to be given.
    """

    columns = ("frame_path", "clip_width", "clip_height")

    def __init__(self, options: Generate, rows: Dataset):
        super().__init__(options, rows)
        self.folder = options.output / self.path({"frame_path": "any"}).parts[0]

    def path(self, row: dict[str, Any]) -> PurePosixPath:
        from lego_pipeline.parity import released_path

        options = self.options
        assert options.steps is not None and options.image_guidance_scale is not None
        name = Path(os.path.abspath(options.model or "kitchen")).name  # of "." too
        return released_path(name, options.seed, options.steps, options.image_guidance_scale, row["frame_path"])

    def facts(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        return {"seed": self.options.seed, "place": [number, len(self.rows)]}

    def record_of(self, path: Path, known: dict[str, Any] | None) -> dict[str, Any] | None:
        if known is None or not path.is_file():
            return None
        return known if hashlib.sha256(path.read_bytes()).hexdigest() == known.get("sha256") else None

    def prepare(self, pipeline: LegoPipeline) -> None:
        from lego_pipeline.parity import chunk_generators
        from lego_pipeline.scheduler import LegoEulerAncestralScheduler

        released = {"eta": 1.0, "conventions": "k-diffusion"}
        pipeline.scheduler = LegoEulerAncestralScheduler.from_config(pipeline.scheduler.config, **released)
        side = pipeline.config["resolution"] // pipeline.vae_scale_factor
        shape = (1, pipeline.vae.config.latent_channels, side, side)
        assert self.options.steps is not None
        places = chunk_generators(
            len(self.rows), self.options.seed, shape, self.options.steps, dtype=pipeline.unet.dtype
        )
        self._places = enumerate(places)

    def start(self, numbers: Sequence[int]) -> None:
        self._generators = {n: next(own for place, own in self._places if place == n) for n in numbers}

    def draw(
        self,
        pipeline: LegoPipeline,
        cache: EmbeddingCache | None,
        jobs: Sequence[Job],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        import torch

        from lego_pipeline.images import to_model_input
        from lego_pipeline.parity import released_jpeg, released_picture, squeeze

        options, side = self.options, pipeline.config["resolution"]
        frames = [read_frame(row) for row in rows]
        texts: dict[str, Any] = texts_of(jobs)
        generators = [self._generators[job.request["place"][0]].clone_state() for job in jobs]  # may be tried again
        with torch.no_grad():
            if pipeline.vlm is not None or cache is not None:
                texts = {"enhancement": pipeline.enhance(frames, **texts, generator=generators, cache=cache)}
            squeezed = torch.stack([to_model_input(squeeze(frame, side), side, side) for frame in frames])
            latents, descriptions = pipeline(
                image=None,
                image_latents=pipeline.encode_image(squeezed),
                **texts,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                image_guidance_scale=options.image_guidance_scale,
                guidance_interval=(0.0, 1.0),
                generator=generators,
                keep_scene=False,
                output_type="latent",
                return_dict=False,
            )
            vae = pipeline.vae
            decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample  # (N, 3, H, W)
        for job, row, values, description in zip(jobs, rows, decoded, descriptions, strict=True):
            picture = released_jpeg(released_picture(values, row["clip_width"], row["clip_height"]))
            records.write_bytes(job.path, picture)
            job.record = options.note(job, pipeline, description) | {
                "path": job.path.relative_to(options.output).as_posix(),
                "sha256": hashlib.sha256(picture).hexdigest(),
            }
            job.status = "written"


def content(row: dict[str, Any]) -> bytes:
    """The file of a row's input frame, undecoded."""
    file = row["image_0"]
    return Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]


def read_frame(row: dict[str, Any]) -> PIL.Image.Image:
    """The input frame of a row, upright RGB.

    Raises:
        ValueError: it can't be read.
    """
    import PIL.Image

    from lego_pipeline.images import to_rgb

    try:
        with PIL.Image.open(io.BytesIO(content(row))) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"`image_0` must be an image that can be read, got: {error}; put it in again.") from error
