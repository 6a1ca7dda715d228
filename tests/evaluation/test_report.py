"""The report: everything is in one file, numbers and pictures are where they belong, plots keep their places."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.evaluation import report, rows, run
from lego_pipeline.evaluation.cases import Cases
from lego_pipeline.evaluation.metrics.base import Missing
from lego_pipeline.evaluation.rows import Pairs, Row
from tests.evaluation.known import Brightness, ColourDistance, Named, flat


@pytest.fixture
def written(pairs: Pairs, make_system: Callable[..., Row], tmp_path: Path) -> str:
    """A report of one system with a name that HTML could mistake, and one missing picture."""
    system = make_system(
        "a&b", [None, *(flat(90 + i, 90, 90) for i in range(11))], prompts={"pair-01": "I <close> it."}
    )
    metrics, missing = [Brightness(), Named(), ColourDistance()], [Missing("clip", "a folder", "pass it")]
    table = [rows.copied_input(pairs), rows.true_frame(pairs), system]
    results, scores = run.evaluate(
        pairs, table, metrics, missing, cache=tmp_path, missing_rows={"mean training target": "Pass --train-data."}
    )
    results |= {"settings": {"command": "lego evaluate"}, "versions": {"numpy": "2"}, "parity": None}
    grids = Cases(pairs, [system], scores, results["metrics"]).grids(3, 0, "a&b", None)
    report.write_report(tmp_path / "report.html", results, grids)
    return (tmp_path / "report.html").read_text()


def test_the_report_refers_to_nothing_outside_itself(written: str):
    assert not re.search(r"(src|href)=\"(?!data:)", written) and "url(" not in written and "<script" not in written


def test_the_report_has_the_table_the_gaps_and_the_tests(written: str):
    assert "a&amp;b" in written and "a&b" not in written and "I &lt;close&gt; it." in written
    assert "<small>11 pairs</small>" in written
    assert "clip: not computed, needs a folder: pass it." in written
    assert "mean training target: not in the table. Pass --train-data." in written
    assert "Brightness ↓" in written and "Named, % ↑" in written and "a&amp;b less input copied" in written
    assert "open drawer" in written and "Verb and noun swapped" in written


def test_the_cases_show_input_system_and_truth_with_their_scores(written: str):
    lot, best, worst = (
        written[written.index(f"<h2>{name}") :] for name in ("Cases drawn", "Best cases", "Worst cases")
    )
    assert "no picture" in lot + best + worst or "pair-00" not in lot
    figure = re.search(
        r'alt="input of (pair-\d+)">.*?alt="a&amp;b of \1">.*?<small>(.*?)</small>.*?alt="truth of', best, re.S
    )
    assert figure and figure[2].startswith("Brightness ")
    [data] = re.findall(r'base64,([^"]+)" alt="input of pair-\d+"', best[: best.index("a&amp;b of")])
    picture = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
    assert picture.shape == (16, 16, 3) and abs(int(picture.mean()) - 105) < 8
    assert lot.index("Best cases") < lot.index("Worst cases")


def test_points_and_ticks_stand_where_their_values_are():
    lines = [
        {"name": name, "kind": "system", "text": "", "mean": m, "low": m - 1, "high": m + 1}
        for name, m in (("a", 1.0), ("b", 9.0))
    ]
    plot = report.draw(lines, guide=5.0)
    a, b = plot["lines"]
    assert plot["guide"] == pytest.approx((a["x"] + b["x"]) / 2, abs=0.2)
    assert plot["left"] < a["x_low"] < a["x"] < a["x_high"] < b["x_high"] < plot["right"] and a["y"] < b["y"]
    assert [tick["text"] for tick in plot["ticks"]] == ["0", "2", "4", "6", "8", "10"]
    assert a["x_low"] == plot["ticks"][0]["x"]


def test_one_value_has_a_scale_too():
    line = {"name": "a", "kind": "system", "text": "", "mean": 3.0, "low": 3.0, "high": 3.0}
    plot = report.draw([line])
    assert plot["left"] < plot["lines"][0]["x"] < plot["right"] and plot["ticks"]


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-3.2, 17.0), (0.001, 0.0014), (9990.0, 10040.0)])
def test_ticks_are_few_round_and_within(ends: tuple[float, float]):
    found = report.ticks(*ends)
    assert 2 <= len(found) <= report.MOST_TICKS + 1 and ends[0] <= found[0] and found[-1] <= ends[1]
    assert all(len(f"{tick:.6g}".replace("0", "").replace(".", "")) <= 4 for tick in found)
