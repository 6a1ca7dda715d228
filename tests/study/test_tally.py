"""Counts, intervals and tests of made-up votes whose answer is known, and the report that is written of them."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.study.page import Key
from lego_pipeline.study.report import markdown, number, write_report
from lego_pipeline.study.tally import tally
from lego_pipeline.study.votes import Votes, check_votes
from tests.study.conftest import SYSTEMS, picks, votes_of

COUNT = 40


def made_key(mode: str = "frames", systems: tuple[str, ...] = ("a", "b", "c"), checks: int = 0) -> Key:
    """A study of 40 rows, of two verbs."""
    questions: dict[str, dict[str, Any]] = {}
    for i in range(COUNT + checks):
        common = {"row": f"row-{i}", "action": "open drawer", "verb": ("open", "take")[i % 2], "noun": "drawer"}
        expected = [] if i < COUNT else [f"{i}-0"]
        if mode == "frames":
            choices = {f"{i}-{k}": name for k, name in enumerate(systems)}
            questions[f"q{i}"] = {**common, "choices": choices, "system": None, "expected": expected}
            continue
        grades = {grade: grade for grade in ("right", "partly", "wrong", "hallucinated")}
        for name in systems:
            questions[f"q{i}-{name}"] = {**common, "choices": grades, "system": name, "expected": []}
    return Key(study="0" * 64, mode=mode, seed=0, secret="00" * 32, systems=dict.fromkeys(systems, ""),
               questions=questions)  # fmt: skip


def voted(key: Key, rater: str, pick: Callable[[str, dict[str, Any], list[str]], str]) -> Votes:
    return check_votes(votes_of(key, rater, pick), key)


def at_random(seed: int, weights: dict[str, float]) -> Callable[[str, dict[str, Any], list[str]], str]:
    """A rater who takes systems (or grades) by these weights."""
    rng = random.Random(seed)

    def pick(name: str, question: dict[str, Any], order: list[str]) -> str:
        return rng.choices(order, [weights[question["choices"][choice]] for choice in order])[0]

    return pick


def test_shares_are_those_of_the_votes() -> None:
    key = made_key()
    taken = {f"q{i}": "a" if i < 24 else "b" for i in range(COUNT)}
    votes = votes_of(key, "anna", lambda name, q, order: next(c for c in order if q["choices"][c] == taken[name]))
    result = tally(key, [check_votes(votes, key)])
    shares = {system["name"]: system for system in result["systems"]}
    assert {name: s["count"] for name, s in shares.items()} == {"a": 24, "b": 16, "c": 0}
    assert shares["a"]["share"] == pytest.approx(0.6) and shares["a"]["of"] == COUNT
    assert shares["a"]["interval"][0] < 0.6 < shares["a"]["interval"][1]
    assert shares["c"]["interval"] == [0, 0] and shares["c"]["wilson"][1] > 0.05
    pairs = {(pair["first"], pair["second"]): pair for pair in result["tests"]["pairs"]}
    assert [pairs["a", "b"][name] for name in ("won", "lost", "tied")] == [24, 16, 0]
    assert [pairs["a", "c"][name] for name in ("won", "lost", "tied")] == [24, 0, 16]
    assert pairs["a", "c"]["p"] == pytest.approx(2 / 2**24)
    assert pairs["b", "c"]["p"] < pairs["b", "c"]["p_holm"] < 0.05 < pairs["a", "b"]["p_holm"]
    assert sum(result["verbs"]["open"].values()) == sum(result["verbs"]["take"].values()) == COUNT // 2


def test_raters_of_one_mind_do_not_narrow_the_interval() -> None:
    """Ten raters who answer alike are one rater to an interval over questions; to Wilson's they are ten."""
    key, pick = made_key(), at_random(5, {"a": 2, "b": 1, "c": 1})
    first = votes_of(key, "anna", pick)
    chosen = {answer["question"]: answer["choice"] for answer in first["answers"]}
    one = tally(key, [check_votes(first, key)])["systems"][0]
    ten = tally(key, [voted(key, f"r{i}", lambda name, q, order: chosen[name]) for i in range(10)])
    assert ten["systems"][0]["interval"] == pytest.approx(one["interval"])
    width = {name: s["wilson"][1] - s["wilson"][0] for name, s in (("one", one), ("ten", ten["systems"][0]))}
    assert width["ten"] < 0.4 * width["one"]
    assert ten["agreement"]["krippendorff_alpha"] == 1 and ten["agreement"]["fleiss_kappa"] == 1


def test_a_better_system_is_found_and_equal_ones_are_not() -> None:
    key = made_key()
    better = tally(key, [voted(key, f"r{i}", at_random(i, {"a": 3, "b": 1, "c": 1})) for i in range(5)])
    equal = tally(key, [voted(key, f"r{i}", at_random(i, {"a": 1, "b": 1, "c": 1})) for i in range(5)])
    assert better["tests"]["any"]["p"] < 0.001 and better["tests"]["any_independent"]["p"] < 0.001
    assert equal["tests"]["any"]["p"] > 0.05 and all(pair["p_holm"] > 0.05 for pair in equal["tests"]["pairs"])
    low, high = equal["agreement"]["krippendorff_interval"]
    assert low < 0 < high and abs(equal["agreement"]["krippendorff_alpha"]) < 0.1


def test_a_rater_who_always_takes_the_first_place_is_seen() -> None:
    key = made_key()
    result = tally(key, [voted(key, "anna", lambda name, question, order: order[0])])
    assert result["places"]["counts"] == [COUNT, 0, 0] and result["places"]["p"] < 1e-10
    assert "Some places on the page were picked more often" in markdown(result)


def test_who_fails_the_attention_checks_is_left_out() -> None:
    key = made_key(checks=4)
    careless = voted(key, "ben", lambda name, question, order: order[0])
    right = sum(careless.answers[f"q{i}"]["choice"] == f"{i}-0" for i in range(COUNT, COUNT + 4))
    assert right < 3
    careful = voted(key, "anna", picks("c"))
    result = tally(key, [careful, careless])
    assert result["questions"] == {"asked": COUNT, "answered": COUNT, "answers": COUNT}
    assert [(r["rater"], r["checks_right"], r["counted"]) for r in result["raters"]] == [
        ("anna", 4, True),
        ("ben", right, False),
    ]
    assert "attention checks right: ben." in markdown(result)
    assert tally(key, [careful, careless], attention=right / 4)["questions"]["answers"] == 2 * COUNT
    with pytest.raises(ValueError, match="1 of 1 raters failed the attention checks"):
        tally(key, [careless])


def test_votes_that_stop_early_are_counted_as_far_as_they_go() -> None:
    key = made_key()
    votes = voted(key, "anna", picks("a"))
    some = Votes("anna", dict(list(votes.answers.items())[:7]), False)
    result = tally(key, [some, voted(key, "ben", picks("b"))])
    assert result["questions"] == {"asked": COUNT, "answered": COUNT, "answers": COUNT + 7}
    assert result["agreement"]["questions_with_several"] == 7 and result["agreement"]["same"] == 0
    with pytest.raises(ValueError, match="nothing was answered"):
        tally(key, [Votes("anna", {}, False)])


def test_grades_are_counted_as_in_the_paper() -> None:
    """Aligned descriptions, and how many of the others hallucinate."""
    key = made_key("descriptions", ("tuned", "untuned"))
    grades = ("right", "right", "right", "partly", "hallucinated")

    def pick(name: str, question: dict[str, Any], order: list[str]) -> str:
        number = int(question["row"].split("-")[1])
        return grades[number % 5] if question["system"] == "tuned" else grades[4 - number % 2]

    result = tally(key, [voted(key, "anna", pick), voted(key, "ben", pick)])
    tuned, untuned = result["systems"]
    assert tuned["grades"]["right"]["share"] == pytest.approx(0.6) and tuned["grades"]["right"]["of"] == 2 * COUNT
    assert tuned["hallucinated_of_not_right"]["share"] == pytest.approx(0.5)
    assert untuned["grades"]["right"]["count"] == 0 and untuned["hallucinated_of_not_right"]["of"] == 2 * COUNT
    [pair] = result["tests"]["pairs"]
    assert (pair["won"], pair["lost"], pair["tied"]) == (24, 0, 16) and pair["p"] == pytest.approx(2 / 2**24)
    assert "hallucinated, of those not right" in markdown(result)


def test_the_report_says_the_same_in_all_three_files(frames_study: Path, tmp_path: Path) -> None:
    key = Key.read(frames_study / "key.json")
    result = tally(key, [voted(key, "anna", picks(SYSTEMS[0])), voted(key, "ben", picks(SYSTEMS[1]))])
    write_report(tmp_path / "report", result)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == result
    page, text = (tmp_path / "report" / "report.html").read_text(), (tmp_path / "report" / "report.md").read_text()
    for part in ("2 raters picked pictures in 6 of 6 questions, 12 answers", "50.0 %", "Krippendorff", *SYSTEMS):
        assert part in page and part in text
    assert not re.search(r"(src|href)\s*=", page)  # nothing outside the file
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") >= 3 and line.endswith("|") for line in rows)


def test_p_values_are_written_so_that_small_ones_can_be_told_apart() -> None:
    assert [number(p) for p in (0.5, 0.0421, 0.00123, 1e-7)] == ["0.50", "0.04", "0.0012", "< 0.0001"]
