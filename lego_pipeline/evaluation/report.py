"""The report of an evaluation as one HTML file: tables, plots, pictures of cases drawn by lot, best and worst."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from lego_pipeline.atomic import write_text
from lego_pipeline.evaluation import results as views

TEMPLATE = Path(__file__).with_name("report.html")
LABELS, PLOT, LINE, TOP = 230, 310, 24, 8  # pixels of a plot: names, scale, height of a row, space above
MOST_TICKS = 6
PICTURE_SIDE = 256  # pixels of the longer side of a picture in the report


def write_report(path: Path, results: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report; it refers to nothing outside itself.

    Args:
        path: of the HTML file.
        results: as in `results.json`, see `lego_pipeline.evaluation.run`.
        grids: {title, note, cases}, a case being {id, action, description, cells}, a cell {caption, picture, scores},
            picture from `encode_picture` or None.

    Raises:
        ImportError: jinja2 is not installed.
    """
    template = load_template()
    plots = {name: plot_of(results, name) for name in results["metrics"]}
    write_text(
        path,
        template.render(
            results=results,
            grids=grids,
            plots={name: plot for name, plot in plots.items() if plot["lines"]},
            swap_plots=swap_plots(results["swap"]),
            best=best_systems(results),
            heading=views.heading,
            cell=views.cell,
            number=views.number,
        ),
    )


def load_template() -> Any:
    """The report's template of jinja2.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('the report is written with jinja2; run `pip install "lego-pipeline[eval]"`.') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def encode_picture(picture: PIL.Image.Image) -> str:
    """A picture as base64 JPEG, made smaller if it is large."""
    picture = picture.convert("RGB")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), PIL.Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    return base64.b64encode(data.getvalue()).decode()


def best_systems(results: Mapping[str, Any]) -> dict[str, str]:
    """By metric the system with the best mean."""
    best = {}
    for name, metric in results["metrics"].items():
        found = {
            row: entry["scores"][name]["mean"] * (1 if metric["higher_is_better"] else -1)
            for row, entry in results["rows"].items()
            if entry["kind"] == "system" and entry["scores"].get(name)
        }
        if found:
            best[name] = max(found, key=lambda row: found[row])
    return best


def plot_of(results: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Means and intervals of all rows by one metric, see `draw`."""
    facts = results["metrics"][metric]
    lines: list[dict[str, Any]] = [
        {"name": name, "kind": row["kind"], "text": views.cell(row["scores"][metric], facts), **row["scores"][metric]}
        for name, row in results["rows"].items()
        if row["scores"].get(metric)
    ]
    floors = [line["mean"] for line in lines if line["name"] == views.COPIED]
    return draw(lines, guide=floors[0] if floors else None)


def swap_plots(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The swap test's shares for one picture and for two, with a line at one half, see `draw`."""
    ways = dict.fromkeys(entry["how"] for entry in entries)
    return {how: _swap_plot([entry for entry in entries if entry["how"] == how]) for how in ways}


def _swap_plot(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    lines = [
        {
            "name": f"{entry['row']}: {entry['label']}, {entry['part']}",
            "kind": entry["kind"],
            "text": views.swap_cells(entry)[-1],
            **{key: 100 * entry[key] for key in ("mean", "low", "high")},
        }
        for entry in entries
    ]
    return draw(lines, guide=50.0, ends=(0.0, 100.0))


def draw(
    lines: Sequence[Mapping[str, Any]], guide: float | None = None, ends: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Places of points, intervals and ticks in pixels.

    Args:
        lines: {name, kind, text, mean, low, high} from top to bottom.
        guide: where a dashed line stands.
        ends: of the scale; None takes those of the intervals.

    Returns:
        width, height, bottom; lines with x, x_low, x_high, y; ticks with x and text; guide or None.
    """
    if not lines:
        return {"lines": []}
    low, high = ends or (min(line["low"] for line in lines), max(line["high"] for line in lines))
    margin = 0.0 if ends else 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(LABELS + PLOT * (value - low) / (high - low), 1)

    bottom = TOP + LINE * len(lines)
    placed = [
        {
            **line,
            "x": place(line["mean"]),
            "x_low": place(line["low"]),
            "x_high": place(line["high"]),
            "y": TOP + LINE * (i + 0.5),
        }
        for i, line in enumerate(lines)
    ]
    return {
        "lines": placed,
        "ticks": [{"x": place(tick), "text": f"{tick:g}"} for tick in ticks(low, high)],
        "guide": None if guide is None else place(guide),
        "left": LABELS,
        "right": LABELS + PLOT,
        "top": TOP,
        "bottom": bottom,
        "width": LABELS + PLOT + 20,
        "height": bottom + 24,
    }


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends: steps of 1, 2 or 5 times a power of ten, `MOST_TICKS` at most."""
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= MOST_TICKS)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
