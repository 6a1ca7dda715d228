"""From scores to what is said of them: means with intervals, tests against floor, ceiling and one another, tables.

Everything ends in one dict, `results.json`, of which the markdown table and the HTML report are two views.

Letters: N pairs of the manifest, G groups that are left out in turn.
"""

import csv
import io
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from lego_pipeline.evaluation.rows import COPIED, Row
from lego_pipeline.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    jackknife_interval,
    paired_difference,
)

SIGNIFICANT = 0.05  # corrected p-value below which a difference is called one
MOST_ACTIONS = 40  # of the breakdown, the most frequent


@dataclass(frozen=True)
class SetScore:
    """A distance between two sets of frames.

    Attributes:
        distance: of all pairs that have a picture.
        left_out: (G,) of all but those of one group.
        pairs: their numbers.
    """

    distance: float
    left_out: tuple[float, ...]
    pairs: tuple[int, ...]


# (N,) float, NaN where there is no picture or no answer, infinite for an exact copy by the paper's PSNR; the distance
# of the set, None where there is none.
Score = np.ndarray | SetScore | None
Scores = Mapping[str, Mapping[str, Score]]  # by row and metric
Clusters = Sequence[Hashable] | None


def interval_of(score: Score, clusters: Clusters) -> Interval | None:
    """Mean and interval of the pairs that have a finite score; None if none has."""
    if score is None:
        return None
    if isinstance(score, SetScore):
        found = jackknife_interval(score.distance, score.left_out, len(score.pairs))[0]
        return replace(found, low=max(0.0, found.low))
    known = np.flatnonzero(np.isfinite(score))
    return bootstrap_interval(score[known].tolist(), clusters=_chosen(clusters, known)) if len(known) else None


def difference_of(first: Score, second: Score, clusters: Clusters) -> tuple[Interval, float] | None:
    """first - second over the pairs that both have, with interval and p-value; None if there are none.

    Distances of sets depend on which pairs they are of, and on how many: None too if these differ.
    """
    if isinstance(first, SetScore) and isinstance(second, SetScore):
        if first.pairs != second.pairs:
            return None
        left_out = np.subtract(first.left_out, second.left_out).tolist()
        return jackknife_interval(first.distance - second.distance, left_out, len(first.pairs))
    if not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
        return None
    known = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
    if not len(known):
        return None
    return paired_difference(first[known].tolist(), second[known].tolist(), clusters=_chosen(clusters, known))


def _chosen(clusters: Clusters, numbers: np.ndarray) -> list[Hashable] | None:
    return None if clusters is None else [clusters[number] for number in numbers]


def summarise(rows: Sequence[Row], scores: Scores, clusters: Clusters) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Interval by row and metric, as in `results.json`."""
    result: dict[str, dict[str, dict[str, Any] | None]] = {}
    for row in rows:
        found = {metric: interval_of(score, clusters) for metric, score in scores[row.name].items()}
        result[row.name] = {metric: None if value is None else asdict(value) for metric, value in found.items()}
    return result


def compare(rows: Sequence[Row], scores: Scores, clusters: Clusters) -> list[dict[str, Any]]:
    """Tests of every system against every other row, on the same pairs.

    Returns:
        By metric: {metric, first, second, mean, low, high, count, p, p_holm}; mean is first - second, p_holm is
        corrected for all tests of the metric.
    """
    systems = [row.name for row in rows if row.kind == "system"]
    others = [row.name for row in rows if row.kind != "system"]
    pairs = [*combinations(systems, 2), *((system, other) for system in systems for other in others)]
    result = []
    for metric in scores[rows[0].name]:
        tests: list[dict[str, Any]] = []
        for first, second in pairs:
            found = difference_of(scores[first][metric], scores[second][metric], clusters)
            if found is not None:
                tests.append({"metric": metric, "first": first, "second": second, **asdict(found[0]), "p": found[1]})
        for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
            result.append({**test, "p_holm": corrected})
    return result


def by_action(rows: Sequence[Row], scores: Scores, actions: Sequence[str]) -> dict[str, Any]:
    """Means of the most frequent actions.

    Returns:
        actions: {action: number of pairs}, the most frequent first; left_out: number of further actions; means:
        {metric: {row: {action: mean or None}}} for metrics that score every pair.
    """
    counts = Counter(actions)
    shown = sorted(counts, key=lambda action: (-counts[action], action))[:MOST_ACTIONS]
    members = {action: np.array([other == action for other in actions]) for action in shown}
    means: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in rows:
        for metric, score in scores[row.name].items():
            if not isinstance(score, np.ndarray) or not np.isfinite(score).any():
                continue
            known = np.isfinite(score)
            means.setdefault(metric, {})[row.name] = {
                action: float(score[known & member].mean()) if (known & member).any() else None
                for action, member in members.items()
            }
    return {
        "actions": {action: counts[action] for action in shown},
        "left_out": len(counts) - len(shown),
        "means": means,
    }


def rank(scores: Scores, system: str, metric: str, higher_is_better: bool) -> list[int]:
    """Numbers of the pairs that have a picture, the best first: by what the system gains over the copied input."""
    own, floor = scores[system][metric], scores[COPIED][metric]
    assert isinstance(own, np.ndarray) and isinstance(floor, np.ndarray)
    gain = np.subtract(own, floor, out=np.zeros(len(own)), where=own != floor)  # 0 between two infinities
    gain *= 1 if higher_is_better else -1
    known = np.flatnonzero(~np.isnan(gain))
    return known[np.argsort(-gain[known], kind="stable")].tolist()


def reading(results: Mapping[str, Any]) -> list[str]:
    """What the table says of systems against doing nothing, one sentence for each metric."""
    sentences = []
    for name, metric in results["metrics"].items():
        floor = results["rows"].get(COPIED, {}).get("scores", {}).get(name)
        tests = [test for test in results["tests"] if test["metric"] == name and test["second"] == COPIED]
        if floor is None or not tests:
            continue
        verdicts: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
        for test in tests:
            is_better = (test["mean"] > 0) == metric["higher_is_better"]
            verdict = "better than" if is_better else "worse than"
            verdicts[verdict if test["p_holm"] < SIGNIFICANT else "not told apart from"].append(test["first"])
        parts = [f"{' and '.join(systems)} {verdict} that" for verdict, systems in verdicts.items() if systems]
        sentence = f"{metric['label']}: the input copied scores {number(floor['mean'], metric)}; {'; '.join(parts)}."
        if not verdicts["better than"]:
            sentence += " By this metric no system here is shown to be better than doing nothing."
        sentences.append(sentence)
    return sentences


def number(value: float, metric: Mapping[str, Any], signed: bool = False) -> str:
    """A score as it is printed, without its unit."""
    digits = 2 if metric["unit"] in ("dB", "%") or metric["kind"] == "set" else 3
    return f"{value:{'+' if signed else ''}.{digits}f}"


def heading(metric: Mapping[str, Any]) -> str:
    """Name of a column: label, unit, and an arrow to where better is."""
    unit = f", {metric['unit']}" if metric["unit"] else ""
    return f"{metric['label']}{unit} {'↑' if metric['higher_is_better'] else '↓'}"


def cell(
    interval: Mapping[str, Any] | None, metric: Mapping[str, Any], signed: bool = False, of: int | None = None
) -> str:
    """A mean with its interval, and with the number of pairs if that is below `of`; empty without one."""
    if interval is None:
        return ""
    mean, low, high = (number(interval[key], metric, signed) for key in ("mean", "low", "high"))
    pairs = "" if of is None or interval["count"] >= of else f", {interval['count']} pairs"
    return f"{mean} ({low} to {high}){pairs}"


def table_text(results: Mapping[str, Any]) -> str:
    """The table with what has to be known to read it, in markdown."""
    metrics = results["metrics"]
    lines = [f"{results['data']['pairs']} pairs. {results['intervals']}", ""]
    lines += _table(
        ["", *(heading(metric) for metric in metrics.values())],
        [
            [
                name if row["count"] == results["data"]["pairs"] else f"{name} ({row['count']} pairs)",
                *(cell(row["scores"].get(key), metric, of=row["count"]) for key, metric in metrics.items()),
            ]
            for name, row in results["rows"].items()
        ],
    )
    lines += [f"- {name}: {row['note']}" for name, row in results["rows"].items() if row["note"]]
    lines += [f"- {name}: not in the table. {why}" for name, why in results["missing_rows"].items()]
    lines += [
        f"- {name}: not computed, needs {missing['needs']}: {missing['how_to_get']}."
        for name, missing in results["missing_metrics"].items()
    ]
    if results["reading"]:
        lines += ["", "### Against doing nothing", "", *(f"- {sentence}" for sentence in results["reading"])]
    return "\n".join(lines) + "\n"


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of `results.json` for reading."""
    metrics = results["metrics"]
    lines = [table_text(results)]
    if results["swap"]:
        lines += ["### Verb and noun swapped", "", results["swap_is"], ""]
        lines += _table(
            ["", "score", "part", "prefers the asked action"], [swap_cells(entry) for entry in results["swap"]]
        )
    lines += ["### Differences on the same pairs", "", results["tests_are"], ""]
    lines += _table(
        ["", "metric", "difference", "p", "p, Holm"],
        [
            [
                f"{test['first']} less {test['second']}",
                metrics[test["metric"]]["label"],
                cell(test, metrics[test["metric"]], signed=True),
                f"{test['p']:.2g}",
                f"{test['p_holm']:.2g}",
            ]
            for test in results["tests"]
        ],
    )
    return "\n".join(lines)


def swap_cells(entry: Mapping[str, Any]) -> list[str]:
    """A line of the table of the swap test."""
    share = f"{entry['mean']:.0%} ({entry['low']:.0%} to {entry['high']:.0%}) of {entry['count']}"
    return [entry["row"], f"{entry['label']}, {entry['how']}", entry["part"], share]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in body), ""]


def scores_csv(rows: Sequence[Row], scores: Scores, samples: Sequence[Mapping[str, Any]]) -> str:
    """Scores of every pair and row; a cell is empty where there is none, and `inf` for an infinite one.

    Args:
        rows, scores: of the table.
        samples: {id, action, video} of the N pairs.
    """
    metrics = [name for name, score in scores[rows[0].name].items() if isinstance(score, np.ndarray)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "id", "action", "video", *metrics])
    for row in rows:
        columns = [score for metric in metrics if isinstance(score := scores[row.name][metric], np.ndarray)]
        for i, sample in enumerate(samples):
            if row.pictures[i] is None:
                continue
            values = ["" if np.isnan(column[i]) else f"{column[i]:.6g}" for column in columns]
            writer.writerow([row.name, sample["id"], sample["action"], sample["video"] or "", *values])
    return text.getvalue()
