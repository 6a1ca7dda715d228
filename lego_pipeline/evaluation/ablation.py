"""Ablations: a grid file says what is compared, one table and one plot say what came out.

A grid file is YAML:

    compare_to: all                     # the row that others are tested against; without it the last one
    rows:                               # name, and what differs from the checkpoint as it is
      - {name: label, parts: label}
      - {name: description, parts: description}
      - {name: random projections, projections: random}
      - {name: untuned VLM, vlm: models/llava}
      - {name: label only, model: runs/label_only/best, parts: label}
      - {name: all}
    sweeps:                             # settings of a call; without `rows` for `compare_to` alone
      - {setting: steps, values: [1, 2, 4, 8], rows: [all]}
      - {setting: guidance_scale, values: [1, 1.5, 3, 5]}

Rows that use the checkpoint's own weights need no training and are marked "at inference": they say what this model
makes of less, not what a model reaches that was trained with less. A row with a `model` of its own is "trained",
unless projections or VLM are replaced in it.

`train/run_ablations.py` draws and scores the cells of a grid.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from lego_pipeline.atomic import write_atomically
from lego_pipeline.evaluation.results import Scores, cell, difference_of, heading, interval_of
from lego_pipeline.evaluation.rows import COPIED, TRUTH

PARTS = ("label", "description", "description+image", "description+text", "description+image+text")
CHOICES = {"parts": PARTS, "projections": ("trained", "random"), "descriptions": ("generate", "manifest")}
SETTINGS = ("steps", "guidance_scale", "image_guidance_scale")
AS_IS, AT_INFERENCE, TRAINED = "as it is", "at inference", "trained"
REFERENCES = (TRUTH, COPIED)  # rows that are no cell of the grid

Setting = Literal["steps", "guidance_scale", "image_guidance_scale"]


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One thing that is compared.

    Attributes:
        name: in table and plot.
        parts: what of the condition is used, the rest is zero.
        projections: "random" puts untrained projections and text mixer in their place.
        vlm: folder or hub id of another VLM of the same sizes, such as the one before tuning.
        model: LegoPipeline folder of its own.
        descriptions: "manifest" takes the true ones instead of the VLM's.
    """

    name: str
    parts: str = PARTS[-1]
    projections: str = "trained"
    vlm: str | None = None
    model: str | None = None
    descriptions: str = "generate"

    @property
    def weights(self) -> str:
        """Whether the row is the checkpoint as it is, changed at inference, or a model that was trained so."""
        if self.projections != "trained" or self.vlm is not None:  # put in afterwards, into whichever model
            return AT_INFERENCE
        if self.model is not None:
            return TRAINED
        return AS_IS if self.parts == PARTS[-1] else AT_INFERENCE


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Values of a setting that rows are drawn with."""

    setting: Setting
    values: tuple[float, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One set of pictures: a row, with one value of a sweep or none."""

    row: AblationRow
    setting: Setting | None = None
    value: float | None = None

    @property
    def name(self) -> str:
        """In the table."""
        if self.setting is None or self.value is None:
            return self.row.name
        return f"{self.row.name}, {self.setting.replace('_', ' ')} {self.value:g}"

    @property
    def weights(self) -> str:
        """As of the row; another setting than the checkpoint's own is a change at inference too."""
        return AT_INFERENCE if self.setting is not None and self.row.weights == AS_IS else self.row.weights

    @property
    def folder(self) -> str:
        """Of its pictures."""
        return re.sub(r"[^a-z0-9.+-]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a grid file asks for."""

    rows: tuple[AblationRow, ...]
    sweeps: tuple[Sweep, ...]
    compare_to: str

    @property
    def cells(self) -> list[Cell]:
        """All rows, then the values of all sweeps."""
        by_name = {row.name: row for row in self.rows}
        swept = [
            Cell(row=by_name[name], setting=sweep.setting, value=value)
            for sweep in self.sweeps
            for name in sweep.rows
            for value in sweep.values
        ]
        return [*(Cell(row=row) for row in self.rows), *swept]


# --- The grid file ---------------------------------------------------------------------------------------------------


def read_grid(path: Path) -> Grid:
    """Reads a grid file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no YAML, an unknown name, or a value that doesn't fit; the message names the file and the place.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`grid` must be a YAML file, found none at {path}; see train/configs/ablations.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}.") from error
    _check_names(content, ("rows", "sweeps", "compare_to"), str(path))
    entries = content.get("rows")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: `rows` must be a list of at least one row, got {entries!r}.")
    rows = tuple(_row(entry, f"{path}, row {number}") for number, entry in enumerate(entries, start=1))
    names = [row.name for row in rows]
    folders = [Cell(row=row).folder for row in rows]
    if len(set(folders)) < len(folders) or "" in folders or set(names) & set(REFERENCES):
        raise ValueError(
            f"{path}: rows must have names that differ in letters or digits and are not {' or '.join(REFERENCES)}, "
            f"got {', '.join(names)}."
        )
    compare_to = content.get("compare_to", names[-1])
    if compare_to not in names:
        raise ValueError(f"{path}: `compare_to` must be one of {', '.join(names)}, got {compare_to!r}.")
    sweeps = content.get("sweeps") or []
    if not isinstance(sweeps, list):
        raise ValueError(f"{path}: `sweeps` must be a list, got {sweeps!r}.")
    grid = Grid(
        rows=rows,
        sweeps=tuple(
            _sweep(entry, names, compare_to, f"{path}, sweep {number}") for number, entry in enumerate(sweeps, start=1)
        ),
        compare_to=compare_to,
    )
    places = [found.folder for found in grid.cells]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise ValueError(f"{path}: every cell must be asked for once, but {', '.join(twice)} is more than once.")
    return grid


def _check_names(entry: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must hold `name: value` entries, got {entry!r}.")
    unknown = [str(name) for name in entry if name not in known]
    if unknown:
        raise ValueError(f"{place}: {', '.join(unknown)} must be one of {', '.join(known)}; correct the name.")


def _row(entry: Any, place: str) -> AblationRow:
    _check_names(entry, [field.name for field in fields(AblationRow)], place)
    for name, value in entry.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: `{name}` must be a text, got {value!r}.")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{place}: `{name}` must be one of {', '.join(CHOICES[name])}, got {value!r}.")
    if "name" not in entry:
        raise ValueError(f"{place} must have a `name`, got {entry!r}.")
    row = AblationRow(**entry)
    needless = [name for name in ("projections", "vlm", "descriptions") if name in entry]
    if row.parts == "label" and needless:
        raise ValueError(f"{place}: `{needless[0]}` must be left out where `parts` is label, which uses no VLM.")
    return row


def _sweep(entry: Any, names: Sequence[str], compare_to: str, place: str) -> Sweep:
    _check_names(entry, [field.name for field in fields(Sweep)], place)
    setting, values, rows = entry.get("setting"), entry.get("values"), entry.get("rows", [compare_to])
    if setting not in SETTINGS:
        raise ValueError(f"{place}: `setting` must be one of {', '.join(SETTINGS)}, got {setting!r}.")
    kinds = (int,) if setting == "steps" else (int, float)
    least = 1 if setting == "steps" else 0
    good = isinstance(values, list) and values
    if not good or not all(isinstance(v, kinds) and not isinstance(v, bool) and least <= v < 1e4 for v in values):
        what = "whole numbers from 1" if setting == "steps" else "numbers from 0"
        raise ValueError(f"{place}: `values` must be a list of {what}, got {values!r}.")
    if not isinstance(rows, list) or not rows or not set(rows) <= set(names):
        raise ValueError(f"{place}: `rows` must be a list of names of rows ({', '.join(names)}), got {rows!r}.")
    return Sweep(setting=setting, values=tuple(sorted(values)), rows=tuple(rows))


# --- The table -------------------------------------------------------------------------------------------------------


def summarise(
    grid: Grid,
    settings: Mapping[str, Mapping[str, Any]],
    scores: Scores,
    metrics: Mapping[str, Mapping[str, Any]],
    clusters: Sequence[Any] | None,
    pairs: int,
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        grid: that was drawn.
        settings: steps and scales of each cell, by name.
        scores: by name of a cell or of a reference, and metric.
        metrics: of `lego_pipeline.evaluation.run.describe`, by name.
        clusters: videos of the pairs, see `lego_pipeline.evaluation.statistics`.
        pairs: how many there are.
    """
    entries = []
    known = {found.name: found for found in grid.cells}
    for name, row in scores.items():
        found = known.get(name)
        intervals = {metric: interval_of(score, clusters) for metric, score in row.items()}
        entry: dict[str, Any] = {
            "name": name,
            "scores": {metric: None if value is None else asdict(value) for metric, value in intervals.items()},
        }
        if found is not None:
            tests = {metric: difference_of(row[metric], scores[grid.compare_to][metric], clusters) for metric in row}
            entry |= {
                "row": asdict(found.row),
                "weights": found.weights,
                "setting": found.setting,
                "value": found.value,
                "settings": dict(settings[name]),
                "less_compare_to": {
                    metric: None if test is None or name == grid.compare_to else {**asdict(test[0]), "p": test[1]}
                    for metric, test in tests.items()
                },
            }
        entries.append(entry)
    return {"pairs": pairs, "compare_to": grid.compare_to, "metrics": dict(metrics), "cells": entries}


def table(results: Mapping[str, Any]) -> str:
    """The table in markdown: mean and 95 % interval; a star where the same pairs differ from `compare_to`."""
    metrics = results["metrics"]
    lines = [
        f"{results['pairs']} pairs; mean (95 % interval). A star: the paired difference to "
        f"{results['compare_to']!r} has an interval without 0, each cell by itself.",
        "",
        f"| | weights | {' | '.join(heading(metric) for metric in metrics.values())} |",
        "|---" * (len(metrics) + 2) + "|",
    ]
    for entry in results["cells"]:
        tests = entry.get("less_compare_to", {})
        cells = []
        for name, metric in metrics.items():
            test = tests.get(name)
            star = " *" if test is not None and (test["low"] > 0 or test["high"] < 0) else ""
            cells.append(cell(entry["scores"].get(name), metric) + star)
        lines.append(f"| {entry['name']} | {entry.get('weights', '')} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{AT_INFERENCE}: the checkpoint's own weights with something left out, replaced or set otherwise, not "
        f"trained for it. {TRAINED}: a model that was trained so.",
    ]
    return "\n".join(lines) + "\n"


# --- The plot --------------------------------------------------------------------------------------------------------


def draw_plot(results: Mapping[str, Any], path: Path) -> None:
    """Quality against what was changed: a line of panels for each metric, the rows first, then each swept setting.

    The copied input is a dashed line in every panel.

    Args:
        results: of `summarise`.
        path: of a PNG or SVG file, there complete or not at all.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib; pip install "lego-pipeline[eval]".') from error
    entries = [entry for entry in results["cells"] if "row" in entry]
    rows = [entry for entry in entries if entry["setting"] is None]
    settings = list(dict.fromkeys(entry["setting"] for entry in entries if entry["setting"] is not None))
    metrics = results["metrics"]
    floors = next((entry["scores"] for entry in results["cells"] if entry["name"] == COPIED), {})
    longest = max(len(entry["name"]) for entry in rows)
    widths = [1.8 + 0.05 * longest, *[2.6] * len(settings)]
    size = (sum(widths) + 0.08 * longest + 0.6, max(1.8, 0.24 * len(rows) + 1.1) * len(metrics))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), len(widths), squeeze=False, width_ratios=widths)
    for line, (name, metric) in zip(panels, metrics.items(), strict=True):
        floor = (floors.get(name) or {}).get("mean")
        _draw_rows(line[0], rows, name, floor)
        line[0].set_xlabel(heading(metric), fontsize=8)
        for panel, setting in zip(line[1:], settings, strict=True):
            swept = [entry for entry in entries if entry["setting"] == setting]
            _draw_sweep(panel, swept, name, floor, is_log=setting == "steps")
            panel.set_xlabel(setting.replace("_", " "), fontsize=8)
            panel.set_ylabel(heading(metric), fontsize=8)
        for panel in line:
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150)
    write_atomically(path, lambda unfinished: unfinished.write_bytes(content.getvalue()))


def _draw_rows(panel: Any, rows: Sequence[Mapping[str, Any]], metric: str, floor: float | None) -> None:
    """Means and intervals from top to bottom, hollow where something was changed at inference."""
    for place, entry in enumerate(rows):
        score = entry["scores"].get(metric)
        if score is not None:
            panel.plot([score["low"], score["high"]], [place, place], color="#4477aa", linewidth=1.2)
            filled = "#4477aa" if entry["weights"] != AT_INFERENCE else "white"
            panel.plot(score["mean"], place, "o", color="#4477aa", markerfacecolor=filled, markersize=5)
    panel.set_yticks(range(len(rows)), [f"{entry['name']} ({entry['weights']})" for entry in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    if floor is not None:
        panel.axvline(floor, color="#999999", linestyle="--", linewidth=1)


def _draw_sweep(
    panel: Any, swept: Sequence[Mapping[str, Any]], metric: str, floor: float | None, is_log: bool
) -> None:
    """One line for each row over the values of a setting."""
    names = list(dict.fromkeys(entry["row"]["name"] for entry in swept))
    for number, name in enumerate(names):
        own = [entry for entry in swept if entry["row"]["name"] == name and entry["scores"].get(metric) is not None]
        if not own:
            continue
        values = [entry["value"] for entry in own]
        mean, low, high = ([entry["scores"][metric][key] for entry in own] for key in ("mean", "low", "high"))
        panel.fill_between(values, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        panel.plot(values, mean, "o-", color=f"C{number}", label=name, markersize=4, linewidth=1.2)
    ticks = sorted({entry["value"] for entry in swept})
    if is_log:
        panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    if floor is not None:
        panel.axhline(floor, color="#999999", linestyle="--", linewidth=1, label=COPIED)
    panel.legend(fontsize=6, frameon=False)


def to_json(results: Mapping[str, Any]) -> str:
    """Text of `results.json`."""
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"
