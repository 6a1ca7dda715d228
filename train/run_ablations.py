"""Draw and score a grid of ablations: parts of the condition, projections, VLMs, steps and guidance scales.

    python train/run_ablations.py --grid train/configs/ablations.yaml --data runs/data/test --output-dir runs/ablations

The grid file is described in `lego_pipeline/evaluation/ablation.py`. Every cell is a folder of pictures as `lego
generate --data` writes them, with the same seed for a pair in all cells; descriptions are written once and shared.
The run ends with `table.md`, `ablations.png` and `results.json` in the output directory. It can be stopped at any
moment: the same command goes on, and what is drawn and scored isn't done again.

Without other weights the metrics are PSNR, SSIM and, for the rendered kitchen, its judge. Of `lego evaluate`'s others
name those that you want with `--metrics`, and their files with `--weights NAME=PATH`.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from lego_pipeline import LegoPipeline
from lego_pipeline.atomic import write_text
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.generate_data import generate_data
from lego_pipeline.cli.model import ModelOptions
from lego_pipeline.cli.records import read_png_record
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation import ablation
from lego_pipeline.evaluation.ablation import AblationRow, Cell, Grid
from lego_pipeline.evaluation.metrics import METRICS, open_metrics
from lego_pipeline.evaluation.metrics.base import Metric
from lego_pipeline.evaluation.rows import Pairs, Row, copied_input, true_frame
from lego_pipeline.evaluation.run import KEPT, ScoreFile, Scorer, describe
from lego_pipeline.projector import LegoProjector
from lego_pipeline.vlm.load import load_processor, load_vlm

logger = logging.getLogger(__name__)

ALL_PARTS = "description+image+text"


@dataclass(kw_only=True)
class RunAblationsConfig:
    grid: Path  # YAML, see lego_pipeline/evaluation/ablation.py
    data: Path  # manifest of pairs
    output_dir: Path  # pictures, scores, table and plot
    split: str | None = None  # of the manifest; None = all rows
    pairs: int = 0  # the first ones only; 0 = all
    model: str | None = None  # LegoPipeline folder or hub id of rows without one; None = the embedded kitchen
    metrics: tuple[str, ...] = ("psnr", "ssim", "judge")  # names as `lego evaluate` has them
    weights: tuple[str, ...] = ()  # NAME=PATH for metrics that need files
    batch_size: int = 8  # pictures drawn at once; changes speed and memory only
    seed: int = 0  # that the seed of each pair is derived from
    device: str | None = None  # None = the first accelerator, or the CPU
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the models

    def __post_init__(self) -> None:
        for name, least in (("pairs", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"`metrics` must be of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}.")
        for text in self.weights:
            if not all(text.partition("=")):
                raise ValueError(f"`weights` must be written NAME=PATH, got {text!r}.")


class LastPipeline:
    """The pipeline of the last cell, kept for the next one if that draws with the same weights."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pipeline: LegoPipeline | None = None

    def get(self, key: Any, load: Callable[[], LegoPipeline]) -> LegoPipeline:
        if self._pipeline is None or key != self._key:
            self._pipeline = None  # freed before the next one is loaded
            self._key, self._pipeline = key, load()
        return self._pipeline


@dataclass(kw_only=True)
class DrawCell(Generate):
    """`lego generate --data` with what only an ablation has."""

    row: AblationRow
    last: LastPipeline = field(default_factory=LastPipeline)

    @property
    def checks_vlm(self) -> bool:
        return self.row.vlm is None

    def settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.row.projections == "random":
            own["projections"] = "random"
        if self.row.vlm is not None:
            own["vlm"] = ModelOptions(model=self.row.vlm).fingerprint()
        return super().settings() | own

    def open(self, **components: Any) -> Any:
        weights = (self.find(), self.used_parts == "label", self.row.projections, self.row.vlm)
        return self.last.get(weights, partial(self._open, **components))

    def _open(self, **components: Any) -> LegoPipeline:
        if self.row.vlm is not None:
            vlm = load_vlm(self.row.vlm, dtype=getattr(torch, self.dtype)).eval()
            components |= {"vlm": vlm, "vlm_processor": load_processor(self.row.vlm)}
        pipeline: Any = super().open(**components)
        if self.row.projections == "random":
            pipeline.projector = random_projector(pipeline.projector, self.seed)
        return pipeline


def random_projector(projector: LegoProjector, seed: int) -> LegoProjector:
    """A projector of the same sizes that was never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: Any = LegoProjector.from_config(copy.copy(projector.config))
    torch.nn.Module.to(fresh, projector.device, projector.dtype)  # diffusers' own warns of modules kept in float32
    return fresh.eval().requires_grad_(False)


def options_of(cell: Cell, config: RunAblationsConfig, data: Path, last: LastPipeline) -> DrawCell:
    """The command that draws a cell."""
    row = cell.row
    is_changed = row.parts != ALL_PARTS or row.projections != "trained" or row.vlm is not None
    uses_vlm = row.parts != "label"
    sweep = {} if cell.setting is None else {cell.setting: cell.value}
    return DrawCell(
        row=row,
        last=last,
        model=row.model or config.model,
        device=config.device,
        dtype=config.dtype,
        parts=row.parts if is_changed else None,  # ty: ignore[invalid-argument-type]
        descriptions=row.descriptions if uses_vlm else None,  # ty: ignore[invalid-argument-type]
        data=data,
        output=config.output_dir / "pictures" / cell.folder,
        seed=config.seed,
        batch_size=config.batch_size,
        cache=config.output_dir / "descriptions" if uses_vlm else None,
        **sweep,  # ty: ignore[invalid-argument-type]
    )


def chosen_pairs(config: RunAblationsConfig) -> tuple[Dataset, Path]:
    """The pairs, and a manifest that holds these alone."""
    rows = read_manifest(config.data, config.split)
    if not config.pairs and config.split is None:
        return rows, config.data
    if config.pairs > len(rows):
        raise ValueError(f"`pairs` must be at most {len(rows)}, the rows of {config.data}, got {config.pairs}.")
    path = config.output_dir / "pairs.parquet"
    write_shard([dict(row) for row in rows.select(range(config.pairs or len(rows)))], path)
    return read_manifest(path), path


def draw(grid: Grid, config: RunAblationsConfig, data: Path) -> dict[str, DrawCell]:
    """Draws what isn't there yet; the commands by cell.

    Raises:
        ValueError, FileNotFoundError: a cell can't be drawn.
        OSError: single pictures failed; the others are there.
    """
    last, commands = LastPipeline(), {}
    for cell in grid.cells:
        commands[cell.name] = options_of(cell, config, data, last)
        commands[cell.name].check_system(commands[cell.name].cache)
    failed = []
    for name, command in commands.items():
        logger.info("%s", name)
        if generate_data(command):
            failed.append(name)
    if failed:
        raise OSError(f"pictures of {', '.join(failed)} failed, see above; correct the cause and run it again.")
    return commands


def score(pairs: Pairs, rows: list[Row], metrics: list[Metric], folder: Path) -> dict[str, Any]:
    """Scores by row and metric, those of earlier runs read back."""
    with tqdm(total=len(rows) * len(metrics) * len(pairs), unit="score", disable=None) as bar:
        scorer = Scorer(pairs, metrics, ScoreFile(folder / KEPT), bar)
        return {row.name: scorer.row(row, pairs.samples({})) for row in rows}


def main(config: RunAblationsConfig) -> None:
    grid = ablation.read_grid(config.grid)
    weights = dict(text.split("=", 1) for text in config.weights)
    cache = config.output_dir / "scores"
    device = str(ModelOptions(device=config.device).find_device())
    metrics, missing = open_metrics(config.metrics, weights, device=device, cache=cache)
    if missing:
        lacking = "; ".join(f"{entry.name} needs {entry.needs}: {entry.how_to_get}" for entry in missing)
        raise FileNotFoundError(f"`metrics` must be ones whose weights are here, but {lacking}")
    dataset, data = chosen_pairs(config)
    pairs = Pairs(dataset)
    commands = draw(grid, config, data)

    rows, settings = [copied_input(pairs)], {}
    if any("target" not in metric.reads for metric in metrics):
        rows.append(true_frame(pairs))
    for name, command in commands.items():
        paths = [command.output / f"{row_id}.png" for row_id in pairs.ids]
        record = read_png_record(paths[0]) or {}
        settings[name] = {key: record.get(key) for key in ablation.SETTINGS}
        rows.append(Row(name=name, kind="system", pictures=[partial(Path, path) for path in paths]))
    scores = score(pairs, rows, metrics, cache)
    ordered = {name: scores[name] for name in (*commands, *(row.name for row in rows if row.kind != "system"))}
    described = {metric.name: describe(metric) for metric in metrics}
    results = ablation.summarise(grid, settings, ordered, described, pairs.clusters(), len(pairs))
    write_text(config.output_dir / "results.json", ablation.to_json(results))
    write_text(config.output_dir / "table.md", ablation.table(results))
    ablation.draw_plot(results, config.output_dir / "ablations.png")
    print(ablation.table(results), end="")


if __name__ == "__main__":
    run(main, RunAblationsConfig, __doc__)
