"""`lego generate --data`: the pictures of a whole manifest, by one process or many, resumable.

By default each row has a seed of its own, derived from its id; the folder is as that of a batch of frames, `<id>.png`
with parameters and `generation.jsonl`. `--parity paper` makes what the release makes, in its folders. Neither depends
on the batch size or the number of processes, see `lego_pipeline.cli.styles`.

Processes take rows in turn. Each notes its pictures in a file of its own, and in the end they become one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lego_pipeline.cli import records
from lego_pipeline.cli.jobs import Job, call_or_report, print_counts
from lego_pipeline.cli.model import open_cache
from lego_pipeline.cli.samples import Sample
from lego_pipeline.cli.styles import Paper, Plain, content, read_frame
from lego_pipeline.generated import named

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset

    from lego_pipeline.cli.generate import Generate
    from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe

PAPER = {"steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}  # the release's settings
PARTS = ".generation-*.jsonl"  # records of processes that have not been joined


def generate_data(options: Generate) -> int:
    """Make the pictures that are not there yet; 0 if all are there in the end, 1 if one failed.

    Raises:
        ValueError, FileNotFoundError: what was asked for can't be served; no picture was made then.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env

    from lego_pipeline.training.launch import LONGEST_WAIT, check_processes

    if options.parity == "paper":
        if options.fast:
            raise ValueError("`--fast` must be left out with `--parity paper`, whose sampler is the release's.")
        given = {name: getattr(options, name) for name in PAPER}
        options = dataclasses.replace(options, **{n: PAPER[n] if v is None else v for n, v in given.items()})
    # A process waits in the end for the others, which may be slower or have more to draw.
    state = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    check_processes(0, state.num_processes)
    if state.num_processes > 1 and options.device is None:
        options = dataclasses.replace(options, device=str(state.device))
    try:
        run = _Run(options, state)
        run.make()
        run.join()
        results: list[dict[str, Any]] = gather_object([job.as_dict() for job in run.jobs])
        if not state.is_main_process:
            return 1 if any(result["status"] == "failed" for result in results) else 0
        results.sort(key=lambda result: run.number_of[result["id"]])
        return print_counts(results, options.output, as_json=options.json)
    finally:
        if state.num_processes > 1:
            state.destroy_process_group()


class _Run:
    """One process's share of a manifest.

    Args:
        options: of the command.
        state: of the processes.
    """

    def __init__(self, options: Generate, state: PartialState):
        from datasets import Image

        from lego_pipeline.data.manifest import read_manifest

        assert options.data is not None
        self.options, self.state = options, state
        rows = read_manifest(options.data, options.split)
        names = [name for name in ("id", "image_0", "action", "description", *Paper.columns) if name in rows.features]
        self.rows: Dataset = rows.select_columns(names).cast_column("image_0", Image(decode=False))
        self.number_of = {row_id: number for number, row_id in enumerate(self.rows["id"][:])}
        self.cache: EmbeddingCache | None = open_cache(options.cache)
        self.recipe: Recipe | None = _imported_recipe(self.cache)
        is_paper = options.parity == "paper"
        default = "manifest" if self.recipe or is_paper else options.default_texts
        self.descriptions = options.descriptions or default
        if self.recipe is not None and self.descriptions == "generate":
            raise ValueError(
                f"`--descriptions` must be manifest with the imported features of {options.cache}, which are of the "
                "manifest's descriptions, got generate; leave it out."
            )
        self.style = (Paper if is_paper else Plain)(options, self.rows)
        self._check_rows()
        self._check_inputs(rows)
        self.file = self.style.folder / records.RECORDS
        self.part = self.style.folder / PARTS.replace("*", str(state.process_index))
        self.known = self._read_records()
        self.jobs = self._own_jobs()

    # --- Before a model is loaded ------------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        """Refuse a manifest that lacks what is asked for, with the rows named."""
        columns, path = self.style.columns, self.options.data
        if not set(columns) <= set(self.rows.column_names):
            raise ValueError(
                f"`--data` must have the columns {', '.join(columns)} for `--parity paper`, got {path}; make it with "
                "`lego convert data --metadata ...`, or leave out `--parity`."
            )
        if self.descriptions == "manifest":
            columns = (*columns, "description")
        facts = self.rows.select_columns(["id", *columns])
        lacking = [row["id"] for row in facts if not all(row[name] for name in columns)]
        if lacking:
            raise ValueError(
                f"`--data` must have {' and '.join(columns)} in every row, got {path}, of which {named(lacking)} "
                "do not; fill them in, or use `--descriptions generate`."
            )
        paths = {row["id"]: self.style.path(row) for row in facts}
        bad = [row_id for row_id, place in paths.items() if not _is_below(place)]
        if bad:
            raise ValueError(f"`--data` must name pictures below `--output`, got {named(bad)} elsewhere; rename them.")
        counts = Counter(paths.values())
        twice = [row_id for row_id, place in paths.items() if counts[place] > 1]
        if twice:
            raise ValueError(
                f"`--data` must have a `frame_path` of its own in every row, got {named(twice)} with that of "
                "another; correct them."
            )

    def _check_inputs(self, rows: Dataset) -> None:
        """Refuse pictures that would replace the manifest's own image files, or those of its other splits."""
        from lego_pipeline.data.manifest import IMAGES

        columns = [rows.data.column(name) for name in IMAGES]
        inputs = {
            Path(image["path"]).resolve()
            for column in columns
            for chunk in column.chunks
            for image in chunk.filter(chunk.field("bytes").is_null()).to_pylist()
            if image and image["path"]
        }
        if not inputs:
            return
        places = [self.options.output / self.style.path(row) for row in self.rows.remove_columns("image_0")]
        for place in places:
            if place.resolve() in inputs:
                raise ValueError(
                    f"`--output` must not replace {place}, a frame of the manifest; choose another folder."
                )

    def _read_records(self) -> dict[str, dict[str, Any]]:
        """Records of all processes of earlier runs; read by all processes before one writes."""
        known = records.read_records(self.file)
        for part in sorted(self.style.folder.glob(PARTS)):
            known |= records.read_records(part)
        self.state.wait_for_everyone()
        return known

    def _own_jobs(self) -> list[Job]:
        """The jobs of this process, those whose picture is there marked as skipped."""
        from tqdm.auto import tqdm

        settings = self.options.settings() | {"descriptions": self.descriptions, "parity": self.options.parity}
        if self.cache is not None:
            settings["cache"] = True if self.recipe is None else self.recipe.name
        numbers = range(self.state.process_index, len(self.rows), self.state.num_processes)
        bar = tqdm(numbers, desc="look for pictures", unit="picture", disable=self._hides_bars(), mininterval=1)
        return [self._job(number, settings) for number in bar]

    def _job(self, number: int, settings: dict[str, Any]) -> Job:
        row = self.rows[number]
        facts = self.style.facts(number, row)
        sample = Sample(id=row["id"], image=Path(str(self.options.data)), action=row["action"], seed=facts["seed"])
        sample.description = row["description"] if self.descriptions == "manifest" else None
        request = {**settings, "action": sample.action, "description": sample.description, **facts}
        job = Job(sample=sample, path=self.options.output / self.style.path(row), request=request)
        try:
            request["image_sha256"] = hashlib.sha256(content(row)).hexdigest()
        except OSError as error:
            job.fail(error)
            return job
        record = self.style.record_of(job.path, self.known.get(sample.id))
        if record and record.get("request") == request:
            job.status, job.record = "skipped", record
        return job

    def _hides_bars(self) -> bool | None:
        return None if self.state.is_main_process else True  # None: shown on a terminal

    # --- Drawing -----------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Draw what is not there yet; a failure is reported and does not stop the others."""
        from accelerate.utils import gather_object
        from tqdm.auto import tqdm

        wanted = [job for job in self.jobs if job.status != "skipped" and job.error is None]
        self._check_cache(wanted)
        if not any(gather_object([len(wanted)])):
            return
        system = self._open()
        with tqdm(total=len(wanted), unit="picture", disable=self._hides_bars()) as bar:
            for start in range(0, len(wanted), self.options.batch_size):
                batch = wanted[start : start + self.options.batch_size]
                self.style.start([self.number_of[job.sample.id] for job in batch])
                call_or_report(
                    lambda jobs: self.style.draw(system, self.cache, jobs, [self._row(job) for job in jobs]), batch
                )
                for job in batch:
                    if job.record:
                        self.part.parent.mkdir(parents=True, exist_ok=True)
                        records.append_record(self.part, job.record)
                bar.update(len(batch))

    def join(self) -> None:
        """Make one generation.jsonl of the records of all processes, in the order of the manifest."""
        from accelerate.utils import gather_object

        own = {job.sample.id: job.record for job in self.jobs if job.record}
        gathered: list[dict[str, Any]] = gather_object([own])
        if not self.state.is_main_process:
            return
        known = self.known
        for some in gathered:
            known |= some
        ordered = sorted(known, key=lambda row_id: self.number_of.get(row_id, -1))  # others first, as they were
        if known:
            records.write_records(self.file, (known[row_id] for row_id in ordered))
        for part in self.style.folder.glob(PARTS):
            part.unlink()

    def _row(self, job: Job) -> dict[str, Any]:
        return self.rows[self.number_of[job.sample.id]]

    def _check_cache(self, wanted: Sequence[Job]) -> None:
        """Refuse the run if imported features are wanted that the cache lacks; all processes hear of it."""
        from accelerate.utils import gather_object
        from tqdm.auto import tqdm

        if self.recipe is None or self.cache is None:
            return
        lacking = []
        for job in tqdm(wanted, desc="look into the cache", unit="row", disable=self._hides_bars(), mininterval=1):
            row = self._row(job)
            try:
                keys = self.cache.keys(read_frame(row), row["action"], self.recipe, row["description"])
            except ValueError:
                continue  # an image that can't be read is reported when its turn comes
            if not all(key in self.cache for key in keys):
                lacking.append(job.sample.id)
        lacking = sorted(gather_object(lacking), key=lambda row_id: self.number_of[row_id])
        if lacking:
            raise ValueError(
                f"`--cache` must hold the features of every row, but {self.options.cache} lacks those of "
                f"{named(lacking)}; add them with `lego convert data`, from the same labels and descriptions."
            )

    def _open(self) -> Any:
        """The system; a pipeline without its VLM where the cache has all."""
        without = {"vlm": None, "vlm_processor": None} if self.options.is_lego and self.recipe is not None else {}
        system: Any = self.options.open(**without)
        if self.options.is_lego:
            if not self.state.is_main_process:
                system.set_progress_bar_config(disable=True)
            self.style.prepare(system)
        return system


def _imported_recipe(cache: EmbeddingCache | None) -> Recipe | None:
    """The recipe of a cache of imported features, None for any other cache.

    Raises:
        ValueError: imported features share the cache with others.
    """
    if cache is None:
        return None
    from lego_pipeline.data.embedding_cache import IMPORTED

    recipes = list(cache.recipes().values())
    imported = [recipe for recipe in recipes if recipe.family == IMPORTED]
    if imported and len(recipes) > 1:
        raise ValueError(
            f"`--cache` must hold the imported features of one VLM and nothing else, but {cache.folder} has "
            f"{len(recipes)} recipes; keep a cache for each."
        )
    return imported[0] if imported else None


def _is_below(path: PurePosixPath) -> bool:
    """Whether a path stays below the folder that it is put to, in files that aren't hidden."""
    return not path.is_absolute() and not any(part.startswith(".") or "\0" in part for part in path.parts)
