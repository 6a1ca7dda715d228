"""What the votes say: shares with intervals, tests, agreement, and what to doubt.

Intervals are bootstrapped over questions (a question with all its votes is drawn, so they say what other questions
would give with these raters), with Wilson's beside them, which take votes as independent and hold at 0 and 100 %.
"""

from __future__ import annotations

import itertools
import statistics as plain
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lego_pipeline.evaluation.statistics import bootstrap_interval, holm
from lego_pipeline.study import agreement, exact
from lego_pipeline.study.page import Key
from lego_pipeline.study.questions import GRADES
from lego_pipeline.study.votes import Votes

ALPHA_RESAMPLES = 1000


def tally(key: Key, all_votes: Sequence[Votes], attention: float = 0.75) -> dict[str, Any]:
    """Counts the votes of a study.

    Args:
        key: of the study.
        all_votes: of each rater.
        attention: raters who answer less than this share of the attention checks right are left out.

    Returns:
        What results.json holds: study, mode, questions, raters, and either systems, tests, places or grades.

    Raises:
        ValueError: no votes to count.
    """
    asked = {name: question for name, question in key.questions.items() if not question["expected"]}
    raters = [_rater(key, votes, attention) for votes in all_votes]
    counted = [votes for votes, rater in zip(all_votes, raters, strict=True) if rater["counted"]]
    answers = [
        (votes.rater, question, answer)
        for votes in counted
        for question, answer in votes.answers.items()
        if question in asked
    ]
    if not answers:
        left_out = len(raters) - len(counted)
        why = f"{left_out} of {len(raters)} raters failed the attention checks" if left_out else "nothing was answered"
        raise ValueError(f"`votes` must hold at least one answer to count, got none: {why}.")
    choices: dict[str, list[str]] = {name: [] for name in asked}
    for _, question, answer in answers:
        choices[question].append(asked[question]["choices"][answer["choice"]])
    result: dict[str, Any] = {
        "study": key.study,
        "mode": key.mode,
        "seed": key.seed,
        "questions": {"asked": len(asked), "answered": sum(map(bool, choices.values())), "answers": len(answers)},
        "attention": attention if len(asked) < len(key.questions) else None,
        "raters": raters,
        "agreement": _agreement(list(choices.values())),
    }
    if key.mode == "frames":
        systems = list(key.systems)
        result["systems"] = _shares(choices, systems)
        result["tests"] = _frame_tests(choices, systems)
        places = Counter(answer["order"].index(answer["choice"]) for _, _, answer in answers)
        counts = [places[place] for place in range(len(systems))]
        result["places"] = {"counts": counts, "p": exact.equal_shares_test(counts).p}
        result["verbs"] = _by_verb(asked, choices, systems)
    else:
        result["systems"] = [_grades(asked, choices, name) for name in key.systems]
        result["tests"] = _grade_tests(asked, choices, list(key.systems))
        result["verbs"] = _by_verb(asked, choices, list(GRADES))
    return result


def _rater(key: Key, votes: Votes, attention: float) -> dict[str, Any]:
    checks = {name: question for name, question in key.questions.items() if question["expected"]}
    seen = [name for name in checks if name in votes.answers]
    right = sum(votes.answers[name]["choice"] in checks[name]["expected"] for name in seen)
    return {
        "rater": votes.rater,
        "answers": len(votes.answers) - len(seen),
        "checks": len(seen),
        "checks_right": right,
        "counted": right >= attention * len(seen) - 1e-9,
        "sealed": votes.is_sealed,
        "seconds_median": plain.median([a["ms"] for a in votes.answers.values()]) / 1000 if votes.answers else None,
    }


def _share(hits: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """A share with its intervals.

    Args:
        hits: by unit (question or row) whether each answer is one that is counted.
    """
    values = [float(hit) for unit in hits.values() for hit in unit]
    units = [name for name, unit in hits.items() for _ in unit]
    count = int(sum(values))
    interval = bootstrap_interval(values, clusters=units)
    return {
        "count": count,
        "of": len(values),
        "share": interval.mean,
        "interval": [interval.low, interval.high],
        "wilson": list(exact.wilson_interval(count, len(values))),
    }


def _shares(choices: Mapping[str, Sequence[str]], systems: Sequence[str]) -> list[dict[str, Any]]:
    """Of each system, how often it was picked."""
    return [
        {"name": name, **_share({question: [c == name for c in made] for question, made in choices.items() if made})}
        for name in systems
    ]


def _frame_tests(choices: Mapping[str, Sequence[str]], systems: Sequence[str]) -> dict[str, Any]:
    """Whether systems differ at all, and each pair: in how many questions one has more votes than the other."""
    votes = np.array([[made.count(name) for name in systems] for made in map(list, choices.values()) if made])
    pairs = []
    for first, second in itertools.combinations(range(len(systems)), 2):
        difference = votes[:, first] - votes[:, second]
        won, lost = int((difference > 0).sum()), int((difference < 0).sum())
        pairs.append(_pair(systems[first], systems[second], won, lost, int((difference == 0).sum())))
    return {
        "any": vars(exact.exchange_test(votes)),
        "any_independent": vars(exact.equal_shares_test([int(n) for n in votes.sum(0)])),
        "pairs": _corrected(pairs),
    }


def _grades(asked: Mapping[str, Any], choices: Mapping[str, Sequence[str]], name: str) -> dict[str, Any]:
    """Of one system's descriptions, how often each grade was given, and how many of those not right hallucinate."""
    own = {asked[question]["row"]: made for question, made in choices.items()
           if made and asked[question]["system"] == name}  # fmt: skip
    if not own:
        return {"name": name, "grades": {}, "hallucinated_of_not_right": None}
    grades = {grade: _share({row: [g == grade for g in made] for row, made in own.items()}) for grade in GRADES}
    not_right = {row: [g == "hallucinated" for g in made if g != "right"] for row, made in own.items()}
    not_right = {row: made for row, made in not_right.items() if made}
    return {"name": name, "grades": grades, "hallucinated_of_not_right": _share(not_right) if not_right else None}


def _grade_tests(
    asked: Mapping[str, Any], choices: Mapping[str, Sequence[str]], systems: Sequence[str]
) -> dict[str, Any]:
    """Each pair of systems: on how many rows one's description is called right by a larger share of its raters."""
    right: dict[str, dict[str, float]] = defaultdict(dict)
    for question, made in choices.items():
        if made:
            right[asked[question]["row"]][asked[question]["system"]] = list(made).count("right") / len(made)
    pairs = []
    for first, second in itertools.combinations(systems, 2):
        both = [(row[first], row[second]) for row in right.values() if first in row and second in row]
        won, lost = sum(a > b for a, b in both), sum(a < b for a, b in both)
        pairs.append(_pair(first, second, won, lost, len(both) - won - lost))
    return {"pairs": _corrected(pairs)}


def _pair(first: str, second: str, won: int, lost: int, tied: int) -> dict[str, Any]:
    return {"first": first, "second": second, "won": won, "lost": lost, "tied": tied,
            "p": exact.sign_test(won, lost).p}  # fmt: skip


def _corrected(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with p-values that are corrected for their number."""
    corrected = holm([pair["p"] for pair in pairs])
    return [{**pair, "p_holm": p} for pair, p in zip(pairs, corrected, strict=True)]


def _agreement(answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Agreement of raters, alpha with an interval from drawing questions."""
    several = [question for question in answers if len(question) > 1]
    alpha, low_high = agreement.krippendorff_alpha(answers), None
    if alpha is not None:
        rng = np.random.default_rng(0)
        drawn = (
            agreement.krippendorff_alpha([several[i] for i in rng.integers(len(several), size=len(several))])
            for _ in range(ALPHA_RESAMPLES)
        )
        low_high = [float(q) for q in np.quantile([a for a in drawn if a is not None], [0.025, 0.975])]
    return {
        "questions_with_several": len(several),
        "same": agreement.pairwise_agreement(answers),
        "krippendorff_alpha": alpha,
        "krippendorff_interval": low_high,
        "fleiss_kappa": agreement.fleiss_kappa(answers),
    }


def _by_verb(
    asked: Mapping[str, Any], choices: Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Counts of answers by the verb of the action, the most frequent verb first; without verbs none."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, made in choices.items():
        if asked[question]["verb"] and made:
            counts[asked[question]["verb"]].update(made)
    ordered = sorted(counts, key=lambda verb: (-counts[verb].total(), verb))
    return {verb: {name: counts[verb][name] for name in names} for verb in ordered}
