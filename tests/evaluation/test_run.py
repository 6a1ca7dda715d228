"""An evaluation of known pictures by known metrics: every number is checked by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lego_pipeline.evaluation import results as views
from lego_pipeline.evaluation import rows, run
from lego_pipeline.evaluation.metrics.base import Missing
from lego_pipeline.evaluation.rows import Pairs, Row
from tests.evaluation.known import Brightness, ColourDistance, Named, flat

VERB_COLOURS = {"open": (200, 40, 40), "close": (40, 200, 40), "take": (40, 40, 200)}


@pytest.fixture
def good(pairs: Pairs, make_system: Callable[..., Row]) -> Row:
    """Every picture in the colour of its verb."""
    return make_system("good", [flat(*VERB_COLOURS[action.verb]) for action in pairs.actions])


def test_means_of_all_rows_are_those_of_the_pictures(pairs: Pairs, good: Row, tmp_path: Path):
    references = [rows.copied_input(pairs), rows.true_frame(pairs)]
    missing = [Missing("clip", "model.safetensors", "Pass it.")]
    metrics = [Brightness(), Named(), ColourDistance()]
    results, scores = run.evaluate(pairs, [*references, good], metrics, missing, cache=tmp_path)
    table = {name: row["scores"] for name, row in results["rows"].items()}
    # Targets are (280 / 3 + i) bright, inputs 100 + i, the system's 280 / 3.
    assert table["input copied"]["brightness"]["mean"] == pytest.approx(20 / 3)
    assert table["good"]["brightness"]["mean"] == pytest.approx(np.mean(range(12)))
    assert table["good"]["named"]["mean"] == 100 and table["true frame"]["named"]["mean"] == 100
    assert table["input copied"]["named"]["mean"] == 50  # grey: argmax is red, which is "open"
    assert table["good"]["colour"]["mean"] == pytest.approx(3 * 5.5**2, rel=1e-5)
    assert table["true frame"]["brightness"] is None and table["true frame"]["colour"] is None
    assert results["missing_metrics"] == {"clip": {"needs": "model.safetensors", "how_to_get": "Pass it."}}
    assert results["data"] == {"pairs": 12, "actions": 4, "videos": 3} and "over videos" in results["intervals"]
    json.dumps(results, allow_nan=False)
    lines = views.scores_csv([*references, good], scores, pairs.facts).splitlines()
    assert lines[0] == "row,id,action,video,brightness,named" and len(lines) == 37
    assert lines[-1] == "good,pair-11,take cup,video 2,11,100"


def test_a_second_run_asks_no_metric_and_gives_the_same(pairs: Pairs, good: Row, tmp_path: Path):
    first, again = Brightness(), Brightness()
    table = [rows.copied_input(pairs), good]
    results, _ = run.evaluate(pairs, table, [first, ColourDistance()], cache=tmp_path)
    whole = (tmp_path / run.KEPT).read_text()
    (tmp_path / run.KEPT).write_text(whole + '{"key": "cut o')
    assert run.evaluate(pairs, table, [again, ColourDistance()], cache=tmp_path)[0] == results
    assert (first.asked, again.asked) == (24, 0)
    kept = run.ScoreFile(tmp_path / run.KEPT)
    kept.add("behind the cut line", [1.0, float("nan")])
    assert run.ScoreFile(tmp_path / run.KEPT).get("behind the cut line")[0] == 1.0


def test_a_run_that_was_stopped_goes_on(pairs: Pairs, good: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "CHUNK", 5)
    metric, table = Brightness(), [rows.copied_input(pairs), good]
    scores = metric.scores

    def stop(generated, target, samples):
        if metric.asked >= 10:
            raise KeyboardInterrupt
        return scores(generated, target, samples)

    metric.scores = stop
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(pairs, table, [metric], cache=tmp_path)
    whole = Brightness()
    results, _ = run.evaluate(pairs, table, [whole], cache=tmp_path)
    assert whole.asked == 14
    assert results == run.evaluate(pairs, table, [Brightness()], cache=tmp_path / "fresh")[0]


def test_a_changed_picture_or_metric_is_scored_anew(pairs: Pairs, good: Row, tmp_path: Path):
    run.evaluate(pairs, [rows.copied_input(pairs), good], [Brightness()], cache=tmp_path)
    flat(0, 0, 0).save(good.pictures[3]())
    changed, other = Brightness(), Brightness()
    run.evaluate(pairs, [rows.copied_input(pairs), good], [changed], cache=tmp_path)
    assert changed.asked == 12
    other.definition = "another mode"
    run.evaluate(pairs, [rows.copied_input(pairs), good], [other], cache=tmp_path)
    assert other.asked == 24


def test_pairs_without_a_picture_are_left_out_and_named(pairs: Pairs, make_system: Callable[..., Row], tmp_path: Path):
    part = make_system("part", [None if i < 2 else flat(90, 90, 90) for i in range(12)])
    table = [rows.copied_input(pairs), part]
    results, scores = run.evaluate(pairs, table, [Brightness(), ColourDistance()], cache=tmp_path)
    entry = results["rows"]["part"]
    assert entry["count"] == 10 and entry["without_picture"] == ["pair-00", "pair-01"]
    assert entry["scores"]["brightness"]["count"] == 10 and entry["scores"]["colour"]["count"] == 10
    assert entry["scores"]["brightness"]["mean"] == pytest.approx(np.mean([280 / 3 + i - 90 for i in range(2, 12)]))
    assert "part,pair-01" not in views.scores_csv(table, scores, pairs.facts)
    test = next(test for test in results["tests"] if test["metric"] == "brightness")
    assert test["count"] == 10  # of the copied input too
    assert not [test for test in results["tests"] if test["metric"] == "colour"]  # distances of other pairs
    few = make_system("few", [flat(90, 90, 90) if i % 3 < 2 else None for i in range(12)])  # a group less
    run.evaluate(pairs, [rows.copied_input(pairs), few, part], [ColourDistance()], cache=tmp_path)


def test_the_swap_test_finds_who_sees_the_verb(pairs: Pairs, good: Row, tmp_path: Path):
    # Drawn with another verb: open <-> close, in that verb's colour. "take cup" shares neither verb nor noun.
    other = {"open": "close", "close": "open"}
    swapped = [
        (lambda p=tmp_path / f"{i}-swapped.png": p) if action.noun == "drawer" else None
        for i, action in enumerate(pairs.actions)
    ]
    for action, read in zip(pairs.actions, swapped, strict=True):
        if read is not None:
            flat(*VERB_COLOURS[other[action.verb]]).save(read())
    table = [rows.copied_input(pairs), rows.true_frame(pairs), good]
    results, _ = run.evaluate(
        pairs, table, [Brightness(), Named()], cache=tmp_path, swapped={"good": {"verb": swapped}}
    )
    found = {(e["row"], e["metric"], e["part"], e["how"]): (e["mean"], e["count"]) for e in results["swap"]}
    assert found == {
        ("good", "brightness", "verb", "other picture"): (0.5, 6),  # both are equally bright
        ("good", "named", "verb", "other picture"): (1.0, 6),
        ("good", "named", "verb", "same picture"): (1.0, 6),
        ("good", "named", "noun", "same picture"): (0.5, 6),  # it looks at the verb only
        ("true frame", "named", "verb", "same picture"): (1.0, 6),
        ("true frame", "named", "noun", "same picture"): (0.5, 6),
        ("input copied", "named", "verb", "same picture"): (0.5, 6),  # red: right of three, wrong of three
        ("input copied", "named", "noun", "same picture"): (0.5, 6),
    }


def test_the_generator_s_text_reaches_the_metric(pairs: Pairs, make_system: Callable[..., Row], tmp_path: Path):
    seen = []

    class Texts(Brightness):
        name, reads = "texts", ("description",)

        def scores(self, generated, target, samples):
            seen.extend((sample.prompt, sample.description) for sample in samples)
            return np.zeros(len(samples))

    system = make_system("told", [flat(0, 0, 0)] * 12, prompts={"pair-00": "The hand opens it."})
    run.evaluate(pairs, [rows.copied_input(pairs), system], [Texts()], cache=tmp_path)
    assert seen[0] == (None, "I open drawer in way 0.") and seen[12] == (
        "The hand opens it.",
        "I open drawer in way 0.",
    )
