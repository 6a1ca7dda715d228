"""An evaluation from pictures to results: every row scored by every metric, swapped actions, and what they amount to.

Scores of a chunk of pairs are kept in a file under a digest of all that they depend on, and so are features by the
metrics themselves, so that a run that was stopped goes on and a second one computes nothing.

Letters: N pairs of the manifest, D width of a feature, G groups that are left out in turn.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lego_pipeline.evaluation import results as views
from lego_pipeline.evaluation.metrics.base import Frame, Metric, Missing, Sample, SampleMetric, SetMetric, metric_key
from lego_pipeline.evaluation.results import Score, Scores, SetScore
from lego_pipeline.evaluation.rows import COPIED, TRUTH, Pairs, Picture, Row
from lego_pipeline.evaluation.statistics import LEVEL, RESAMPLES
from lego_pipeline.evaluation.swap import PARTS, Part, swap_actions

CHUNK = 240  # pairs that are scored and kept together; a multiple of the released code's batches of 30
GROUPS = 10  # for the interval of a distance between sets
KEPT = "scores.jsonl"
SWAP_IS = (
    "Share of pairs in which a score is better for the asked action than for one with another verb (or noun); ties "
    "count half, and 50 % is what a score reaches that does not see the action. Same picture: what the score says of "
    "one picture, told the asked action and told the other. Other picture: what it says of two pictures of one "
    "system, drawn for the asked action and for the other."
)


class ScoreFile:
    """Numbers that were computed before, by a digest of all that they depend on.

    A line that an interruption cut off is left out.

    Args:
        path: of a JSON-lines file, made with the first number.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, list[float]] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._is_cut = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["values"]
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, key: str) -> list[float] | None:
        """The numbers, None if they are not known."""
        return self._known.get(key)

    def add(self, key: str, values: Sequence[float]) -> None:
        """Keeps numbers; NaN and infinities too."""
        self._known[key] = list(values)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self._is_cut + json.dumps({"key": key, "values": self._known[key]}) + "\n")
        self._is_cut = False


class Scorer:
    """Scores rows of the table, each number once.

    Args:
        pairs: N pairs.
        metrics: that score.
        known: numbers of earlier runs.
        bar: counts pairs times metrics.
    """

    def __init__(self, pairs: Pairs, metrics: Sequence[Metric], known: ScoreFile, bar: Any):
        self.pairs, self.metrics, self.known, self.bar = pairs, metrics, known, bar
        self.groups = groups_of(pairs)
        self._targets: dict[str, np.ndarray] = {}  # (N, D) of the true frames, by metric

    def row(self, row: Row, samples: Sequence[Sample]) -> dict[str, Score]:
        """All scores of a row; none where the true frame would be compared with itself."""
        scores: dict[str, Score] = {}
        for metric in self.metrics:
            if row.name == TRUTH and (isinstance(metric, SetMetric) or "target" in metric.reads):
                scores[metric.name] = None if isinstance(metric, SetMetric) else np.full(len(self.pairs), np.nan)
                self.bar.update(len(self.pairs))
            elif isinstance(metric, SetMetric):
                scores[metric.name] = self._distance(metric, row)
            else:
                scores[metric.name] = self.values(metric, row.pictures, samples, row.name)
        return scores

    def values(
        self, metric: SampleMetric, pictures: Sequence[Picture], samples: Sequence[Sample], label: str
    ) -> np.ndarray:
        """(N,) scores of some pictures, NaN where there is none or no answer."""
        values = np.full(len(self.pairs), np.nan)
        self.bar.set_description(f"{label}: {metric.title}")
        for first in range(0, len(self.pairs), CHUNK):
            numbers = [i for i in range(first, min(first + CHUNK, len(self.pairs))) if pictures[i] is not None]
            if numbers:
                values[numbers] = self._chunk(metric, pictures, samples, numbers)
            self.bar.update(min(CHUNK, len(self.pairs) - first))
        return values

    def _chunk(
        self, metric: SampleMetric, pictures: Sequence[Picture], samples: Sequence[Sample], numbers: Sequence[int]
    ) -> list[float]:
        generated = self._frames(pictures, numbers)
        target = [self.pairs.frame("image_1", i) for i in numbers] if "target" in metric.reads else generated
        chosen = [samples[i] for i in numbers]
        facts = [
            [frame.digest, true.digest, frame.start_digest, *_texts(metric, sample)]
            for frame, true, sample in zip(generated, target, chosen, strict=True)
        ]
        key = _digest([metric_key(metric), facts])
        found = self.known.get(key)
        if found is None:
            found = [float(value) for value in metric.scores(generated, target, chosen)]
            self.known.add(key, found)
        return found

    def _frames(self, pictures: Sequence[Picture], numbers: Sequence[int]) -> list[Frame]:
        frames = []
        for i in numbers:
            read = pictures[i]
            assert read is not None
            frames.append(Frame(read(), start=self.pairs.content("image_0", i)))
        return frames

    def _features(self, metric: SetMetric, pictures: Sequence[Picture], numbers: Sequence[int]) -> np.ndarray:
        parts = []
        for first in range(0, len(numbers), CHUNK):
            features = metric.features(self._frames(pictures, numbers[first : first + CHUNK]))
            assert features is not None
            parts.append(features)
        return np.concatenate(parts)

    def _distance(self, metric: SetMetric, row: Row) -> SetScore | None:
        """The distance to the true frames of the same pairs, and without each group; None of too few pairs."""
        self.bar.set_description(f"{row.name}: {metric.title}")
        everything = list(range(len(self.pairs)))
        numbers = [i for i in everything if row.pictures[i] is not None]
        if metric.name not in self._targets:
            self._targets[metric.name] = self._features(metric, self.pairs.pictures("image_1"), everything)
        own, target = self._features(metric, row.pictures, numbers), self._targets[metric.name][numbers]
        groups = self.groups[numbers]
        self.bar.update(len(self.pairs))
        kept = [groups != group for group in sorted(set(groups.tolist()))]
        if len(kept) < 2 or min(some.sum() for some in kept) < 2:
            return None
        every = np.ones(len(numbers), bool)
        distances = [self._kept_distance(metric, own[some], target[some]) for some in (every, *kept)]
        return SetScore(distances[0], tuple(distances[1:]), tuple(numbers)) if np.isfinite(distances).all() else None

    def _kept_distance(self, metric: SetMetric, own: np.ndarray, target: np.ndarray) -> float:
        contents = [hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (own, target)]
        key = _digest([metric_key(metric), contents])
        found = self.known.get(key)
        if found is None:
            found = [float(metric.distance(own, target))]
            self.known.add(key, found)
        return found[0]


def groups_of(pairs: Pairs) -> np.ndarray:
    """(N,) number of the group that each pair is left out with; a video is in one group."""
    names = pairs.clusters() or pairs.ids
    order = {name: i for i, name in enumerate(sorted(set(names), key=lambda name: _digest([name])))}
    return np.array([order[name] % GROUPS for name in names])


def _texts(metric: Metric, sample: Sample) -> list[Any]:
    """What a score depends on of a sample."""
    texts: list[Any] = [sample.boxes_0, sample.boxes_1]
    if "action" in metric.reads:
        texts += [sample.action, sample.verb, sample.noun]
    if "description" in metric.reads:
        texts += [sample.description, sample.prompt]
    return texts


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# --- The swap test ---------------------------------------------------------------------------------------------------


def _other_sample(sample: Sample, action: Any) -> Sample:
    return dataclasses.replace(sample, action=action.action, verb=action.verb, noun=action.noun)


@dataclass(frozen=True, kw_only=True)
class SwapTest:
    """One row by one metric, told or drawn for another verb or noun: N pictures, N samples."""

    row: Row
    metric: SampleMetric
    part: Part
    how: str
    pictures: Sequence[Picture]
    samples: Sequence[Sample]


def swap_tests(
    pairs: Pairs,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    samples: Mapping[str, Sequence[Sample]],
    swapped: Mapping[str, Mapping[Part, Sequence[Picture]]],
) -> list[SwapTest]:
    """All that the data and the metrics allow.

    Args:
        pairs, rows, metrics: of the table.
        samples: of each row.
        swapped: by system and part its pictures of the swapped actions.
    """
    others = {part: swap_actions(pairs.ids, pairs.actions, part) for part in PARTS}
    tests = []
    for metric in metrics:
        if isinstance(metric, SetMetric):
            continue
        is_told = "action" in metric.reads and "description" not in metric.reads
        for row in rows:
            for part in PARTS if is_told and (row.kind == "system" or row.name in (TRUTH, COPIED)) else ():
                if not any(others[part]):
                    continue
                pictures = [p if others[part][i] is not None else None for i, p in enumerate(row.pictures)]
                told = [
                    sample if other is None else _other_sample(sample, other)
                    for sample, other in zip(samples[row.name], others[part], strict=True)
                ]
                facts = {"row": row, "metric": metric, "part": part}
                tests.append(SwapTest(**facts, how="same picture", pictures=pictures, samples=told))
            for part, pictures in swapped.get(row.name, {}).items():
                facts = {"row": row, "metric": metric, "part": part}
                tests.append(SwapTest(**facts, how="other picture", pictures=pictures, samples=samples[row.name]))
    return tests


def swap_share(test: SwapTest, asked: Score, other: np.ndarray, clusters: views.Clusters) -> dict[str, Any] | None:
    """Share of pairs in which a score prefers the asked action, see `SWAP_IS`; None if it scores no pair both ways.

    Args:
        test: what was compared.
        asked: (N,) scores for the asked action.
        other: (N,) for the other.
        clusters: of the pairs.

    Returns:
        {row, kind, metric, label, part, how, mean, low, high, count}.
    """
    assert isinstance(asked, np.ndarray)
    is_better = asked > other if test.metric.higher_is_better else asked < other
    prefers = np.where(np.isnan(asked) | np.isnan(other), np.nan, is_better + 0.5 * (asked == other))
    interval = views.interval_of(prefers, clusters)
    if interval is None:
        return None
    facts = {"row": test.row.name, "kind": test.row.kind, "metric": test.metric.name, "label": test.metric.title}
    return {**facts, "part": test.part, "how": test.how, **dataclasses.asdict(interval)}


# --- All of it -------------------------------------------------------------------------------------------------------


def evaluate(
    pairs: Pairs,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    missing: Sequence[Missing] = (),
    *,
    cache: Path,
    swapped: Mapping[str, Mapping[Part, Sequence[Picture]]] | None = None,
    missing_rows: Mapping[str, str] | None = None,
    has_bar: bool | None = None,
) -> tuple[dict[str, Any], Scores]:
    """Scores all rows and says what the scores amount to.

    Args:
        pairs: N pairs.
        rows: references and at least one system, names unique; `input copied` among them.
        metrics: that can be computed here.
        missing: those that can't.
        cache: folder of kept numbers.
        swapped: by system and part its N pictures of the swapped actions.
        missing_rows: why a row is not there, by name.
        has_bar: whether a progress bar is shown; None shows it on a terminal.

    Returns:
        The dict of `results.json` without settings and versions, and the scores.

    Raises:
        ValueError, FileNotFoundError: a picture can't be read, or a metric lacks something.
    """
    clusters = pairs.clusters()
    samples = {row.name: pairs.samples(row.facts.get("prompts", {})) for row in rows}
    tests = swap_tests(pairs, rows, metrics, samples, swapped or {})
    total = (len(rows) * len(metrics) + len(tests)) * len(pairs)
    with tqdm(total=total, unit="score", disable=None if has_bar is None else not has_bar) as bar:
        scorer = Scorer(pairs, metrics, ScoreFile(cache / KEPT), bar)
        scores = {row.name: scorer.row(row, samples[row.name]) for row in rows}
        shares = [
            swap_share(
                test,
                scores[test.row.name][test.metric.name],
                scorer.values(test.metric, test.pictures, test.samples, f"{test.row.name}, other {test.part}"),
                clusters,
            )
            for test in tests
        ]
    videos = {fact["video"] for fact in pairs.facts if fact["video"]}
    summary = views.summarise(rows, scores, clusters)
    unit = "pairs" if clusters is None else "videos"
    results: dict[str, Any] = {
        "data": {"pairs": len(pairs), "actions": len({a.action for a in pairs.actions}), "videos": len(videos)},
        "metrics": {metric.name: describe(metric) for metric in metrics},
        "missing_metrics": {entry.name: {"needs": entry.needs, "how_to_get": entry.how_to_get} for entry in missing},
        "rows": {
            row.name: {
                "kind": row.kind,
                "note": row.note,
                "count": row.count,
                "without_picture": [pairs.ids[i] for i, picture in enumerate(row.pictures) if picture is None]
                if row.kind == "system"
                else [],
                "facts": {name: value for name, value in row.facts.items() if name != "prompts"},
                "scores": summary[row.name],
            }
            for row in rows
        },
        "missing_rows": dict(missing_rows or {}),
        "intervals": (
            f"{LEVEL:.0%} intervals: bootstrap over {unit} ({RESAMPLES} resamples); of a distance between sets, "
            f"jackknife over {GROUPS} groups of {unit}."
        ),
        "tests": views.compare(rows, scores, clusters),
        "tests_are": (
            f"On the pairs that both have: sign-flip test over {unit} ({RESAMPLES} draws). Of distances between sets "
            "a jackknife t test, where both rows have the very same pairs. Holm's correction is for all tests of one "
            "metric."
        ),
        "by_action": views.by_action(rows, scores, [action.action for action in pairs.actions]),
        "swap": [share for share in shares if share is not None],
        "swap_is": SWAP_IS,
    }
    results["reading"] = views.reading(results)
    return results, scores


def describe(metric: Metric) -> dict[str, Any]:
    """What `results.json` says of a metric."""
    return {
        "label": metric.title,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "kind": "set" if isinstance(metric, SetMetric) else "sample",
        "definition": metric.definition,
        "weights": dict(metric.weights),
    }
