"""Tests between rows, the sentences and tables made of them, and the order of cases."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lego_pipeline.evaluation import results as views
from lego_pipeline.evaluation.results import SetScore
from lego_pipeline.evaluation.rows import COPIED, Row
from lego_pipeline.evaluation.statistics import holm, paired_difference

METRIC = {"label": "PSNR", "unit": "dB", "higher_is_better": True, "kind": "sample"}


def rows_of(**kinds: str) -> list[Row]:
    return [Row(name=name.replace("_", " "), kind=kind, pictures=[]) for name, kind in kinds.items()]


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    """Results of some rows by one metric."""

    def make(rows: list[Row], scores: dict, **metric: Any) -> dict[str, Any]:
        summary = views.summarise(rows, scores, None)
        entries = {row.name: {"kind": row.kind, "note": "", "count": 3, "scores": summary[row.name]} for row in rows}
        results: dict[str, Any] = {"data": {"pairs": 3}, "intervals": "Intervals.", "tests_are": "Tests."}
        results |= {"metrics": {"psnr": {**METRIC, **metric}}, "missing_metrics": {}, "missing_rows": {}, "swap": []}
        results |= {"rows": entries, "tests": views.compare(rows, scores, None)}
        return {**results, "reading": views.reading(results)}

    return make


def test_systems_are_tested_against_one_another_and_every_other_row():
    rng = np.random.default_rng(0)
    rows = rows_of(input_copied="floor", a="system", b="system")
    scores = {row.name: {"psnr": rng.normal(i, 1, 40)} for i, row in enumerate(rows)}
    tests = views.compare(rows, scores, None)
    assert [(test["first"], test["second"]) for test in tests] == [("a", "b"), ("a", COPIED), ("b", COPIED)]
    interval, p_value = paired_difference(scores["a"]["psnr"].tolist(), scores["b"]["psnr"].tolist())
    assert (tests[0]["mean"], tests[0]["low"], tests[0]["p"]) == (interval.mean, interval.low, p_value)
    assert [test["p_holm"] for test in tests] == holm([test["p"] for test in tests])


def test_distances_of_sets_are_compared_group_by_group():
    everything = tuple(range(30))
    first, second = SetScore(10.0, (9.0, 11.0, 10.0), everything), SetScore(8.0, (7.0, 9.0, 8.0), everything)
    found = views.difference_of(first, second, None)
    assert found is not None
    assert found[0].mean == 2.0 and (found[0].low, found[0].high) == (2.0, 2.0)  # both move together
    alone = views.interval_of(SetScore(1.0, (0.0, 2.0, 1.0), everything), None)
    assert alone is not None and alone.low == 0.0 and alone.high > 1.0  # no distance is below 0
    for other in (SetScore(8.0, (7.0, 9.0), tuple(range(20))), SetScore(8.0, (7.0, 9.0, 8.0), tuple(range(1, 31)))):
        assert views.difference_of(first, other, None) is None  # of other pairs


def test_what_has_no_score_is_left_out():
    assert views.interval_of(None, None) is None and views.interval_of(np.full(3, np.nan), None) is None
    interval = views.interval_of(np.array([1.0, np.nan, np.inf, 3.0]), ["a", "b", "b", "c"])
    assert interval is not None and (interval.mean, interval.count) == (2.0, 2)
    assert views.difference_of(np.array([1.0, np.nan]), np.array([np.nan, 1.0]), None) is None


def test_the_reading_says_who_is_better_than_doing_nothing(make_results: Callable[..., dict[str, Any]]):
    rows = rows_of(input_copied="floor", high="system", low="system", same="system")
    rng = np.random.default_rng(1)
    floor = rng.normal(20, 1, 60)
    moved = {COPIED: floor, "high": floor + 2, "low": floor - 2, "same": floor + rng.normal(0, 1, 60)}
    scores = {name: {"psnr": values} for name, values in moved.items()}
    [sentence] = make_results(rows, scores)["reading"]
    assert "high better than that; low worse than that; same not told apart from that" in sentence
    [turned] = make_results(rows, scores, higher_is_better=False)["reading"]
    assert "low better than that; high worse than that" in turned
    without = [row for row in rows if row.name != "high"]
    assert make_results(without, scores)["reading"][0].endswith(
        "no system here is shown to be better than doing nothing."
    )


def test_the_table_has_a_column_for_each_metric_and_says_what_is_missing(make_results: Callable[..., dict[str, Any]]):
    rows = rows_of(input_copied="floor", ours="system")
    results = make_results(rows, {COPIED: {"psnr": np.array([1.0, 1.0, 1.0])}, "ours": {"psnr": np.full(3, 2.5)}})
    results["missing_metrics"] = {"clip": {"needs": "a folder", "how_to_get": "pass the weights clip=FOLDER"}}
    results["missing_rows"] = {"mean training target": "Pass --train-data MANIFEST."}
    results["rows"]["ours"]["count"] = 2
    lines = views.markdown(results).splitlines()
    assert "|  | PSNR, dB ↑ |" in lines and "| input copied | 1.00 (1.00 to 1.00) |" in lines
    assert "| ours (2 pairs) | 2.50 (2.50 to 2.50) |" in lines
    assert "- clip: not computed, needs a folder: pass the weights clip=FOLDER." in lines
    assert "- mean training target: not in the table. Pass --train-data MANIFEST." in lines
    assert any(line.startswith("| ours less input copied | PSNR | +1.50 (+1.50 to +1.50) | 0.") for line in lines)


def test_actions_are_told_apart_the_most_frequent_first(monkeypatch: pytest.MonkeyPatch):
    rows = rows_of(input_copied="floor", true_frame="ceiling")
    scores = {
        COPIED: {"psnr": np.array([1.0, 2.0, 4.0, np.nan]), "fid": SetScore(1.0, (1.0,), (0, 1, 2, 3))},
        "true frame": {"psnr": np.full(4, np.nan), "fid": None},
    }
    monkeypatch.setattr(views, "MOST_ACTIONS", 2)
    found = views.by_action(rows, scores, ["take", "open", "open", "cut"])
    assert found["actions"] == {"open": 2, "cut": 1} and found["left_out"] == 1
    assert found["means"] == {"psnr": {COPIED: {"open": 3.0, "cut": None}}}


def test_cases_are_ordered_by_what_is_gained_over_the_copied_input():
    scores = {
        COPIED: {"psnr": np.array([10.0, 20.0, 5.0, 1.0])},
        "ours": {"psnr": np.array([12.0, 19.0, 9.0, np.nan])},
    }
    assert views.rank(scores, "ours", "psnr", higher_is_better=True) == [2, 0, 1]
    assert views.rank(scores, "ours", "psnr", higher_is_better=False) == [1, 0, 2]
    exact = {COPIED: {"psnr": np.array([9.0, np.inf, np.inf])}, "ours": {"psnr": np.array([np.inf, np.inf, 9.0])}}
    assert views.rank(exact, "ours", "psnr", higher_is_better=True) == [0, 1, 2]
