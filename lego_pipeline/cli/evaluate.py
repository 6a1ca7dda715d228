"""`lego evaluate`: the paper's table for one system or several, beside what its numbers have to be read against.

Writes `table.md`, `results.json`, `scores.csv` and a self-contained `report.html`. Numbers and features are kept in a
cache, so the same command goes on where it was interrupted, and a second run computes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.generated import Generated, named, parse_name, read_generated

if TYPE_CHECKING:
    from lego_pipeline.evaluation.metrics.base import Metric, Missing
    from lego_pipeline.evaluation.rows import Pairs, Picture, Row
    from lego_pipeline.evaluation.swap import Part

ALL = "all"
KITCHEN_SOURCE = "rendered kitchen"
PACKAGES = (
    "lego-pipeline",
    "torch",
    "torchvision",
    "transformers",
    "torchmetrics",
    "timm",
    "scipy",
    "numpy",
    "pillow",
)
RECORDED = ("system", "model", "steps", "guidance_scale", "image_guidance_scale", "version")  # of a system's records


@dataclass(kw_only=True)
class Evaluate:
    """Score generated pictures against their true frames, beside floor, ceiling and doubt."""

    generated: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """NAME=FOLDER that `lego generate --data` wrote, or a released run; repeat it for more systems."""
    data: Path
    """Manifest of the pairs."""
    output: Path
    """Folder of the report."""
    split: str | None = None
    """Split of the manifest; without it all rows."""
    pairs: int | None = None
    """The first rows only, as many as this."""
    metrics: tuple[str, ...] = (ALL,)
    """Names of metrics, or all that can be computed here."""
    weights: tuple[str, ...] = ()
    """NAME=PATH of what metrics need, or folder=PATH where all of it lies; the table names what is missing."""
    parity: Literal["paper"] | None = None
    """Compute metrics as the paper's code does, with its quirks."""
    train_data: Path | None = None
    """Manifest whose targets are averaged for a row; without it the train split of `--data`, if it has one."""
    pipeline: Path | None = None
    """Pipeline folder whose VAE the targets go through for a row; without it the kitchen's, for its own pairs."""
    swapped: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=FOLDER of the system's pictures of the manifest that `lego swap` wrote; may be repeated."""
    allow_missing: bool = False
    """Go on where pictures are missing; means are then over those that are there."""
    cases_of: str | None = None
    """System whose best and worst cases are shown; without it the first."""
    rank_by: str | None = None
    """Metric that finds them, by the gain over the copied input; without it the first that scores single frames."""
    cases: int = 8
    """Cases shown of each kind: drawn by lot, best, worst."""
    seed: int = 0
    """Of the lot."""
    cache: Path | None = None
    """Folder of what was computed; without it one in the output folder."""
    batch_size: int = 16
    """Pictures that a network sees at once: changes speed and memory, not the scores."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; without it the first accelerator, or the CPU."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Make the report; 0 if all that was asked for by name is in it, else 1."""
        self._check()
        systems = self._parsed("--generated", self.generated)
        swaps = self._parsed("--swapped", self.swapped) if self.swapped else {}
        from datasets import Dataset

        from lego_pipeline.atomic import write_text
        from lego_pipeline.data.manifest import read_manifest
        from lego_pipeline.evaluation import results as views
        from lego_pipeline.evaluation.cases import Cases
        from lego_pipeline.evaluation.metrics import open_metrics
        from lego_pipeline.evaluation.report import load_template, write_report
        from lego_pipeline.evaluation.rows import Pairs
        from lego_pipeline.evaluation.run import evaluate

        load_template()  # what it lacks is said before hours of work
        dataset: Dataset = read_manifest(self.data, self.split)
        dataset = dataset.select(range(min(len(dataset), self.pairs or len(dataset))))
        pairs = Pairs(dataset)
        facts = self._facts(dataset, pairs)
        rows = [
            self._system(read_generated(name, folder, facts, "--generated"), pairs) for name, folder in systems.items()
        ]
        swapped = {name: self._swapped(name, folder, systems, facts, pairs) for name, folder in swaps.items()}
        device = self._device()
        names, unfit = self._names(pairs)
        metrics, missing = open_metrics(
            names, self._weights(), self.parity, device, self._cache() / "features", self.batch_size
        )
        missing += unfit
        if not metrics:
            lacking = "; ".join(f"{entry.name} needs {entry.needs}: {entry.how_to_get}" for entry in missing)
            raise ValueError(f"`--metrics` must have one that can be computed here, but {lacking}.")
        self._check_ranking(systems, metrics)
        references, missing_rows = self._references(pairs, metrics, device)
        found, scores = evaluate(
            pairs,
            [*references, *rows],
            metrics,
            missing,
            cache=self._cache(),
            swapped=swapped,
            missing_rows=missing_rows,
        )
        results: dict[str, Any] = {
            "settings": self._settings(pairs),
            "parity": self.parity,
            "versions": {"python": platform.python_version(), **_versions()},
            **found,
        }
        self.output.mkdir(parents=True, exist_ok=True)
        text = views.markdown(results)
        write_text(self.output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_text(self.output / "table.md", text)
        write_text(self.output / "scores.csv", views.scores_csv([*references, *rows], scores, pairs.facts))
        cases = Cases(pairs, rows, scores, results["metrics"])
        grids = cases.grids(self.cases, self.seed, self.cases_of or rows[0].name, self.rank_by)
        write_report(self.output / "report.html", results, grids)
        is_complete = self.metrics == (ALL,) or not missing
        if self.json:
            print(json.dumps({"ok": is_complete, "output": str(self.output), **results}))
        else:
            print(views.table_text(results), end="")
            print(f"{self.output / 'report.html'}: {len(rows)} systems, {len(pairs)} pairs")
        return 0 if is_complete else 1

    # --- What was asked for ------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what no data could serve."""
        for flag, value, least in (
            ("--pairs", self.pairs, 1),
            ("--batch-size", self.batch_size, 1),
            ("--cases", self.cases, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{flag}` must be at least {least}, got {value}.")
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"`--output` must be a folder, but {self.output} is a file.")
        if not self.generated:
            raise ValueError("`--generated` must name at least one folder of pictures, such as --generated LEGO=out/.")
        if not self.metrics:
            raise ValueError("`--metrics` must be `all` or names, got none; leave it out for all.")
        if ALL in self.metrics and len(self.metrics) > 1:
            raise ValueError(f"`--metrics` must be `all` or names, got {' '.join(self.metrics)}.")
        if self.pipeline is not None and not self.pipeline.is_dir():
            raise NotADirectoryError(f"`--pipeline` must be a pipeline folder, got {self.pipeline}; check the path.")

    def _names(self, pairs: Pairs) -> tuple[list[str], list[Missing]]:
        """Metrics that are opened, and those of `all` that say nothing of these data."""
        from lego_pipeline.evaluation.metrics import METRICS, Missing

        if self.metrics != (ALL,):
            return list(self.metrics), []
        if _is_kitchen(pairs):
            return list(METRICS), []
        judges = [name for name in METRICS if name.startswith("judge")]
        needs, way = (
            "pairs of the rendered kitchen, which are all that it knows",
            "ask for it by name to have it anyway",
        )
        return [name for name in METRICS if name not in judges], [Missing(name, needs, way) for name in judges]

    def _parsed(self, flag: str, texts: Sequence[str]) -> dict[str, Path]:
        from lego_pipeline.evaluation.rows import REFERENCES

        result: dict[str, Path] = {}
        for text in texts:
            name, folder = parse_name(text, flag)
            if name in result or name in REFERENCES:
                raise ValueError(
                    f"`{flag}` must give every system a name of its own, got {name!r}, which is taken; write NAME=."
                )
            result[name] = folder
        return result

    def _weights(self) -> dict[str, str]:
        weights = {}
        for text in self.weights:
            name, sign, place = text.partition("=")
            if not sign or not name or not place:
                raise ValueError(f"`--weights` must be written NAME=PATH, got {text!r}.")
            weights[name] = place
        return weights

    def _check_ranking(self, systems: dict[str, Path], metrics: Sequence[Metric]) -> None:
        from lego_pipeline.evaluation.metrics.base import SetMetric

        if self.cases_of is not None and self.cases_of not in systems:
            raise ValueError(f"`--cases-of` must be one of {', '.join(systems)}, got {self.cases_of!r}.")
        known = [metric.name for metric in metrics if not isinstance(metric, SetMetric)]
        if self.rank_by is not None and self.rank_by not in known:
            raise ValueError(f"`--rank-by` must be one of {', '.join(known)}, got {self.rank_by!r}.")

    def _cache(self) -> Path:
        return self.cache or self.output / "cache"

    def _device(self) -> str:
        import torch

        from lego_pipeline.loading import check_device

        if self.device is not None:
            return str(check_device(self.device))
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def _settings(self, pairs: Pairs) -> dict[str, Any]:
        """What the run was asked, for `results.json`."""
        return {
            "command": shlex.join(["lego", *sys.argv[1:]]),
            "generated": list(self.generated),
            "swapped": list(self.swapped),
            "data": str(self.data),
            "split": self.split,
            "data_sha256": pairs.digest(),
            "metrics": list(self.metrics),
            "parity": self.parity,
            "train_data": None if self.train_data is None else str(self.train_data),
            "pipeline": None if self.pipeline is None else str(self.pipeline),
            "allow_missing": self.allow_missing,
            "seed": self.seed,
        }

    # --- Pictures ----------------------------------------------------------------------------------------------------

    def _facts(self, dataset: Any, pairs: Pairs) -> list[dict[str, Any]]:
        """What pictures are found and checked by."""
        paths = dataset["frame_path"][:] if "frame_path" in dataset.features else [None] * len(pairs)
        return [
            {
                "id": row_id,
                "action": fact["action"],
                "frame_path": path,
                "image_sha256": hashlib.sha256(pairs.content("image_0", number)).hexdigest(),
            }
            for number, (row_id, fact, path) in enumerate(zip(pairs.ids, pairs.facts, paths, strict=True))
        ]

    def _system(self, found: Generated, pairs: Pairs) -> Row:
        from lego_pipeline.evaluation.rows import Row

        lacking = [row_id for row_id, path in zip(pairs.ids, found.paths, strict=True) if path is None]
        if len(lacking) == len(pairs):
            raise ValueError(
                f"`--generated` must hold pictures of the manifest's rows, but {found.folder} has none named "
                f"{pairs.ids[0]}.png or so; name the folder that `lego generate --data` wrote, or the `--split`."
            )
        if lacking and not self.allow_missing:
            raise ValueError(
                f"`--generated` must have a picture for every row, but {found.folder} lacks {named(lacking)}; "
                "generate them, choose rows with `--split` or `--pairs`, or pass `--allow-missing`."
            )
        used = [found.records[row_id] for row_id in pairs.ids if row_id in found.records]
        facts: dict[str, Any] = {"folder": str(found.folder)}
        for name in RECORDED:
            values = {json.dumps(record.get(name)) for record in used} - {"null"}
            if values:
                facts[name] = json.loads(values.pop()) if len(values) == 1 else "various"
        facts["prompts"] = {
            record["id"]: record["description"] for record in used if isinstance(record.get("description"), str)
        }
        note = f"{len(lacking)} pairs without a picture are left out of its means." if lacking else ""
        pictures: list[Picture] = [None if path is None else partial(Path, path) for path in found.paths]
        return Row(name=found.name, kind="system", pictures=pictures, note=note, facts=facts)

    def _swapped(
        self, name: str, folder: Path, systems: dict[str, Path], facts: list[dict[str, Any]], pairs: Pairs
    ) -> dict[Part, list[Picture]]:
        """A system's pictures of the swapped actions."""
        from lego_pipeline.evaluation.swap import PARTS, swap_actions, swapped_id

        if name not in systems:
            raise ValueError(f"`--swapped` must name a system of `--generated` ({', '.join(systems)}), got {name!r}.")
        result: dict[Part, list[Picture]] = {}
        for part in PARTS:
            others = swap_actions(pairs.ids, pairs.actions, part)
            wanted = [
                {**fact, "id": swapped_id(fact["id"], part), "action": other and other.action, "frame_path": None}
                for fact, other in zip(facts, others, strict=True)
            ]
            paths = read_generated(name, folder, wanted, "--swapped").paths
            result[part] = [None if path is None else partial(Path, path) for path in paths]
        if not any(picture for pictures in result.values() for picture in pictures):
            raise ValueError(
                f"`--swapped` must hold pictures named as {swapped_id(pairs.ids[0], 'verb')}.png, got {folder}; "
                "draw the manifest that `lego swap` writes."
            )
        return result

    def _references(self, pairs: Pairs, metrics: Sequence[Metric], device: str) -> tuple[list[Row], dict[str, str]]:
        """The rows beside the systems, and why one is not there."""
        from lego_pipeline.data.manifest import read_manifest
        from lego_pipeline.evaluation import rows as kinds

        rows, missing, folder = [kinds.copied_input(pairs)], {}, self._cache() / "pictures"
        try:
            train = read_manifest(self.train_data or self.data, "train")
        except ValueError:
            train = None if self.train_data is None else read_manifest(self.train_data)
        if train is None:
            missing[kinds.MEAN] = "Pass the training pairs with --train-data MANIFEST."
        else:
            rows.append(kinds.mean_target(pairs, train, folder))
        model = self.pipeline or (KITCHEN if _is_kitchen(pairs) else None)
        if model is None:
            missing[kinds.ROUND_TRIP] = "Pass the pipeline whose VAE it goes through with --pipeline FOLDER."
        else:
            rows.append(kinds.round_trip(pairs, model, folder, device))
        others = kinds.other_true_frames(pairs)
        for name, where in ((kinds.SAME_VIDEO, "one video"), (kinds.OTHER_VIDEO, "different videos")):
            if name not in [row.name for row in others]:
                missing[name] = f"No two pairs of one action come from {where}."
        if any("target" not in metric.reads for metric in metrics):
            rows.append(kinds.true_frame(pairs))
        return [*rows, *others], missing


def _is_kitchen(pairs: Pairs) -> bool:
    return all(fact["source"] == KITCHEN_SOURCE for fact in pairs.facts)


def _versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
