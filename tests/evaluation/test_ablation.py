"""Grid files: what they ask for, what is wrong with them; the table and the plot of given scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lego_pipeline.evaluation import ablation
from lego_pipeline.evaluation.ablation import AblationRow, Cell, Grid, Sweep, read_grid

ROOT = Path(__file__).parents[2]
METRICS = {
    "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True, "kind": "sample"},
    "judge": {"label": "Judge", "unit": "%", "higher_is_better": True, "kind": "sample"},
}


def write(path: Path, **changes: Any) -> Path:
    content = {"rows": [{"name": "label", "parts": "label"}, {"name": "all"}], **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return path


def test_the_example_asks_for_the_paper_s_rows_and_three_sweeps() -> None:
    grid = read_grid(ROOT / "train" / "configs" / "ablations.yaml")
    weights = {row.name: row.weights for row in grid.rows}
    assert weights["description + both"] == "as it is" and grid.compare_to == "description + both"
    assert {weights[name] for name in ("action label", "description", "random projections")} == {"at inference"}
    assert [sweep.setting for sweep in grid.sweeps] == list(ablation.SETTINGS)
    folders = [cell.folder for cell in grid.cells]
    assert len(set(folders)) == len(folders) == 7 + 2 * 5 + 4 + 3


def test_rows_say_whether_they_were_trained_so() -> None:
    assert AblationRow(name="a").weights == "as it is"
    assert AblationRow(name="a", descriptions="manifest").weights == "as it is"
    assert AblationRow(name="a", projections="random").weights == "at inference"
    assert AblationRow(name="a", vlm="x").weights == "at inference"
    assert AblationRow(name="a", parts="label", model="x").weights == "trained"
    assert AblationRow(name="a", projections="random", model="x").weights == "at inference"


def test_cells_are_rows_and_then_swept_values(tmp_path: Path) -> None:
    sweeps = [{"setting": "steps", "values": [4, 1], "rows": ["label", "all"]},
              {"setting": "guidance_scale", "values": [1.5]}]  # fmt: skip
    grid = read_grid(write(tmp_path / "grid.yaml", sweeps=sweeps))
    assert grid.compare_to == "all"
    assert [cell.name for cell in grid.cells] == [
        "label", "all", "label, steps 1", "label, steps 4", "all, steps 1", "all, steps 4", "all, guidance scale 1.5",
    ]  # fmt: skip
    assert grid.cells[-1].folder == "all-guidance-scale-1.5"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rows": None}, "`rows` must be a list of at least one row"),
        ({"row": []}, "row must be one of rows, sweeps, compare_to"),
        ({"rows": ["label"]}, "row 1 must hold `name: value` entries"),
        ({"rows": [{"parts": "label"}]}, "row 1 must have a `name`"),
        ({"rows": [{"name": "a", "part": "label"}]}, "row 1: part must be one of name, parts"),
        ({"rows": [{"name": "a", "parts": "image"}]}, "`parts` must be one of label, description"),
        ({"rows": [{"name": "a", "vlm": 3}]}, "`vlm` must be a text, got 3"),
        ({"rows": [{"name": "a", "parts": "label", "vlm": "x"}]}, "`vlm` must be left out where `parts` is label"),
        ({"rows": [{"name": "a b"}, {"name": "A-B"}]}, "names that differ in letters or digits"),
        ({"rows": [{"name": "input copied"}]}, "are not true frame or input copied"),
        ({"compare_to": "none"}, "`compare_to` must be one of label, all"),
        ({"sweeps": 3}, "`sweeps` must be a list"),
        ({"sweeps": [{"setting": "seed", "values": [1]}]}, "`setting` must be one of steps"),
        ({"sweeps": [{"setting": "steps", "values": [1.5]}]}, "must be a list of whole numbers from 1, got [1.5]"),
        ({"sweeps": [{"setting": "steps", "values": [0]}]}, "must be a list of whole numbers from 1, got [0]"),
        ({"sweeps": [{"setting": "guidance_scale", "values": []}]}, "must be a list of numbers from 0, got []"),
        ({"sweeps": [{"setting": "steps", "values": [1], "rows": ["b"]}]}, "must be a list of names of rows"),
        ({"sweeps": [{"setting": "steps", "values": [1, 1]}]}, "all-steps-1 is more than once"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_with_its_place(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="must") as error:
        read_grid(write(tmp_path / "grid.yaml", **changes))
    assert expected in str(error.value) and str(tmp_path / "grid.yaml") in str(error.value)


def test_no_file_and_no_yaml_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`grid` must be a YAML file, found none"):
        read_grid(tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text("rows: [")
    with pytest.raises(ValueError, match="must be YAML"):
        read_grid(tmp_path / "grid.yaml")


@pytest.fixture
def results() -> dict[str, Any]:
    """A label that is 2 dB below LEGO and a judge that can't tell them apart, two sweeps, and the copied input."""
    label, whole = AblationRow(name="label", parts="label"), AblationRow(name="all")
    grid = Grid(
        rows=(label, whole),
        sweeps=(
            Sweep(setting="steps", values=(1, 2, 4), rows=("label", "all")),
            Sweep(setting="guidance_scale", values=(1, 3), rows=("all",)),
        ),
        compare_to="all",
    )
    rng = np.random.default_rng(0)
    base = rng.normal(20, 1, 40)
    scores: dict[str, Any] = {}
    for cell in grid.cells:
        gain = (0 if cell.row is label else 2) + 0.5 * (cell.value or 0)
        judge = np.where(rng.random(40) < 0.5, 100.0, 0.0)
        scores[cell.name] = {"psnr": base + gain + rng.normal(0, 0.2, 40), "judge": judge}
    scores["label"]["judge"] = scores["all"]["judge"].copy()
    scores["input copied"] = {"psnr": base - 1, "judge": np.full(40, np.nan)}
    settings = {cell.name: {"steps": 4} for cell in grid.cells}
    return ablation.summarise(grid, settings, scores, METRICS, None, 40)


def test_the_table_has_every_cell_with_its_weights_and_a_star_where_it_differs(results: dict[str, Any]) -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in ablation.table(results).splitlines() if " | " in line}
    assert set(lines) == {"", *(entry["name"] for entry in results["cells"])}
    assert lines[""].endswith("| weights | PSNR, dB ↑ | Judge, % ↑ |")
    assert lines["all, steps 1"].startswith("| all, steps 1 | at inference | ")
    assert lines["label"].startswith("| label | at inference | ") and lines["all"].startswith("| all | as it is | ")
    psnr, judge = lines["label"].strip(" |").split(" | ")[2:]
    assert psnr.endswith(" *") and not judge.endswith("*")
    assert "*" not in lines["all"]
    mean = results["cells"][1]["scores"]["psnr"]["mean"]
    assert f"{mean:.2f} (" in lines["all"]
    assert lines["input copied"].strip(" |").count(" | ") == 2  # no judge of the copied input: an empty cell


def test_differences_are_those_of_the_same_pairs(results: dict[str, Any]) -> None:
    by_name = {entry["name"]: entry for entry in results["cells"]}
    test = by_name["label"]["less_compare_to"]["psnr"]
    assert -2.3 < test["low"] < test["mean"] < test["high"] < -1.7 and test["p"] < 0.001
    assert test["high"] - test["low"] < 0.3  # the pairs' own spread of 1 dB is not in it
    assert by_name["all"]["less_compare_to"]["psnr"] is None
    assert by_name["label"]["settings"] == {"steps": 4}


def test_the_plot_shows_every_metric_and_sweep(results: dict[str, Any], tmp_path: Path) -> None:
    ablation.draw_plot(results, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count('id="axes_') == 2 * 3  # metrics times rows, steps, guidance scale


def test_a_grid_without_sweeps_has_a_plot_too(results: dict[str, Any], tmp_path: Path) -> None:
    rows = [entry for entry in results["cells"] if entry.get("setting") is None]
    ablation.draw_plot({**results, "cells": rows}, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count('id="axes_') == 2


def test_a_cell_s_folder_is_a_file_name() -> None:
    assert Cell(row=AblationRow(name="Description + both/image")).folder == "description-+-both-image"
