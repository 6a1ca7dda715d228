"""`lego generate`: one frame and an action to one picture, or a batch of them into a folder.

A batch comes from a folder of images, from `--image` given several times, or from `--actions-file`. Every sample has
its own seed, so a result depends neither on its neighbours nor on the order. The folder holds `<id>.png`, each with
its parameters in the PNG text, and `generation.jsonl` with the same facts. A picture that is there already and was
made from the same input, model and settings is not made again: the same command goes on where it was interrupted.
A whole manifest is `lego_pipeline.cli.generate_data`'s.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lego_pipeline.cli import records
from lego_pipeline.cli.jobs import Job, call_or_report, print_counts, texts_of
from lego_pipeline.cli.model import open_cache
from lego_pipeline.cli.samples import Sample, check_ids, check_seed, derive_seed, find_images, read_actions
from lego_pipeline.cli.systems import SystemOptions

if TYPE_CHECKING:
    import PIL.Image

    from lego_pipeline import LegoPipeline
    from lego_pipeline.baselines import Baseline
    from lego_pipeline.data.embedding_cache import EmbeddingCache


@dataclass(kw_only=True)
class Generate(SystemOptions):
    """Draw the action frame for a frame and an action, or for many, with LEGO or a baseline."""

    output: Path
    """A .png for one frame, or a folder for several."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Input frame, or a folder of them; may be repeated. With --actions-file: the folder that its images are in."""
    action: str | None = None
    """What the hands shall do, such as "open drawer"."""
    description: str | None = None
    """Detailed description of the action, instead of the VLM's own."""
    actions_file: Path | None = None
    """CSV or JSONL with the columns image, action and, if wanted, description, seed, id."""
    data: Path | None = None
    """Manifest to draw, instead of --image and --action; `accelerate launch -m lego_pipeline.cli` shares it out."""
    split: str | None = None
    """Split of the manifest; without it all rows."""
    parity: Literal["paper"] | None = None
    """Draw a manifest as the released LEGO does: square frames, its sampler, stretched contrast, JPEGs in its tree."""
    seed: int = 0
    """Seed of a single picture. In a folder every picture has its own, derived from this and its id."""
    batch_size: int = 1
    """Pictures made at once: changes speed and memory, not the pictures."""
    cache: Path | None = None
    """Folder of descriptions and embeddings, which are taken from there and added: one description for an action on a
    frame, whatever the seed."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Make what is asked; 0 if every picture is there in the end, 1 if one failed."""
        self._check()
        if self.data is not None:
            from lego_pipeline.cli.generate_data import generate_data

            return generate_data(self)
        jobs = self._jobs()
        if self.output.suffix.lower() != ".png":
            self._run_folder(jobs)
        else:
            self._run_one(jobs[0])
            if not self.json:
                print(f"{self.output}: {jobs[0].as_dict()['description']}")
                return 0
        return print_counts([job.as_dict() for job in jobs], self.output, as_json=self.json)

    def _check(self) -> None:
        """Refuse what no model could serve."""
        if self.data is not None:
            given = {"--image": self.image, "--action": self.action, "--description": self.description}
            for flag, value in {**given, "--actions-file": self.actions_file}.items():
                if value:
                    raise ValueError(f"`{flag}` must be left out with `--data`, whose rows hold frames and actions.")
        elif self.split is not None or self.descriptions is not None or self.parity is not None:
            raise ValueError("`--split`, `--descriptions` and `--parity` must go with `--data`: name a manifest.")
        elif self.actions_file is not None:
            if self.action is not None or self.description is not None:
                raise ValueError(
                    "`--action` and `--description` must be columns of the `--actions-file`, not flags beside it."
                )
        elif not self.image:
            raise ValueError("`--image` or `--actions-file` must be given; name a frame, such as --image frame.png.")
        elif not (self.action or "").strip() and not (self.description or "").strip():
            raise ValueError('`--action` or `--description` must be given, such as --action "open drawer".')
        self.check_system(self.cache)
        if self.parity is not None and (self.system != "lego" or self.parts is not None):
            raise ValueError("`--system` and `--parts` must be left out with `--parity paper`, which is LEGO's.")
        if self.batch_size < 1:
            raise ValueError(f"`--batch-size` must be at least 1, got {self.batch_size}.")
        check_seed(self.seed, "--seed")
        if self.data is not None and self.output.suffix.lower() == ".png" and not self.output.is_dir():
            raise ValueError(f"`--output` must be a folder for a manifest's pictures, got {self.output}.")
        records.check_output(self.output, ".png", folder=True)

    def _jobs(self) -> list[Job]:
        """One job for each picture that is asked for."""
        one = self.output.suffix.lower() == ".png"
        if self.actions_file is not None:
            samples = read_actions(self.actions_file, self.image, self.seed)
        else:
            samples = [
                Sample(
                    id=path.stem,
                    image=path,
                    action=self.action,
                    description=self.description,
                    seed=self.seed if one else derive_seed(self.seed, path.stem),
                )
                for path in find_images(self.image)
            ]
        if one and len(samples) != 1:
            raise ValueError(
                f"`--output` must be a folder for {len(samples)} pictures, got {self.output}; leave out the .png."
            )
        check_ids(samples)
        inputs = {sample.image.resolve() for sample in samples}
        settings = self.settings()
        if self.cache is not None:
            settings["cache"] = True  # of another precision, with another description
        jobs = []
        for sample in samples:
            path = self.output if one else self.output / f"{sample.id}.png"
            if path.resolve() in inputs:
                raise ValueError(f"`--output` must not replace the input frame {path}; choose another name.")
            asked = {"action": sample.action, "description": sample.description, "seed": sample.seed}
            jobs.append(Job(sample=sample, path=path, request=settings | asked))
        return jobs

    def settings(self) -> dict[str, Any]:
        """What all pictures of the request depend on."""
        return self.system_settings()

    def note(self, job: Job, system: LegoPipeline | Baseline, description: str) -> dict[str, Any]:
        """The record of a picture that was drawn."""
        from lego_pipeline import __version__

        return {
            "id": job.sample.id,
            "image": str(job.sample.image),
            "action": job.sample.action,
            "description": description,
            "seed": job.sample.seed,
            **self.facts(system),
            "model": self.model_name,
            "version": __version__,
            "request": job.request,
        }

    def draw_batch(
        self,
        system: LegoPipeline | Baseline,
        cache: EmbeddingCache | None,
        jobs: Sequence[Job],
        frames: Sequence[PIL.Image.Image],
    ) -> None:
        """Draw and write the pictures of some jobs in one call, each from its own seed, and note their records.

        Args:
            system: from `open`.
            jobs: all with an action or none, and so with descriptions.
            frames: their input frames.
        """
        import torch

        generators = [torch.Generator().manual_seed(job.sample.seed) for job in jobs]
        texts = texts_of(jobs)
        pictures, descriptions = self.draw_pictures(system, frames, generators=generators, cache=cache, **texts)
        for job, picture, description in zip(jobs, pictures, descriptions, strict=True):
            job.record = self.note(job, system, description)
            records.write_png(job.path, picture, job.record)
            job.status = "written"

    def _run_one(self, job: Job) -> None:
        """Make a single picture; a failure refuses the request."""
        from lego_pipeline.images import read_image

        _hash_input(job)
        read_image(job.sample.image)  # a bad file is refused before the model is loaded
        cache = open_cache(self.cache)
        self._call(self.open(), cache, [job])

    def _run_folder(self, jobs: Sequence[Job]) -> None:
        """Make the pictures that are not there yet; a failure is reported and does not stop the others."""
        import tqdm

        file = self.output / records.RECORDS
        known = records.read_records(file)
        wanted = []
        for job in jobs:
            try:
                _hash_input(job)
            except (OSError, ValueError) as error:
                job.fail(error)
                continue
            record = records.read_png_record(job.path)
            if record and record.get("request") == job.request:
                job.status, job.record = "skipped", record
                known[job.sample.id] = record
            else:
                wanted.append(job)
        if known:
            records.write_records(file, known.values())
        if not wanted:
            return
        cache = open_cache(self.cache)
        system = self.open()
        with tqdm.tqdm(total=len(wanted), unit="picture", disable=None) as bar:
            for batch in _batches(wanted, self.batch_size):
                call_or_report(lambda part: self._call(system, cache, part), batch)
                for job in batch:
                    if job.record:
                        known[job.sample.id] = job.record
                        records.append_record(file, job.record)
                bar.update(len(batch))
        if known:
            records.write_records(file, known.values())

    def _call(self, system: LegoPipeline | Baseline, cache: EmbeddingCache | None, batch: Sequence[Job]) -> None:
        """Make and write the pictures of one call of the system."""
        from lego_pipeline.images import read_image

        self.draw_batch(system, cache, batch, [read_image(job.sample.image) for job in batch])


def _hash_input(job: Job) -> None:
    """Note the content of the input; refuse a row that was not understood or names no file."""
    if job.sample.problem:
        raise ValueError(job.sample.problem)
    if not job.sample.image.is_file():
        raise FileNotFoundError(f"`image` must be an image file, but there is no file at {job.sample.image}.")
    job.request["image_sha256"] = hashlib.sha256(job.sample.image.read_bytes()).hexdigest()


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Lists of at most `size` jobs; all of one list have an action or none has, and so with descriptions."""

    def kind(job: Job) -> tuple[bool, bool]:
        return job.sample.action is None, job.sample.description is None

    for _, group in itertools.groupby(sorted(jobs, key=kind), key=kind):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]
