"""How far raters agree beyond chance.

Answers are names without an order. 1 is full agreement, 0 is what chance gives; values below 0 are disagreement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def pairwise_agreement(answers: Sequence[Sequence[str]]) -> float | None:
    """Share of pairs of raters of one question that gave the same answer; each question with two raters counts alike.

    Args:
        answers: for each question the answers that it got.

    Returns:
        None if no question has two answers.
    """
    shares = [_agreement(question) for question in answers if len(question) > 1]
    return sum(shares) / len(shares) if shares else None


def krippendorff_alpha(answers: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for names; questions may have any number of answers.

    Args:
        answers: for each question the answers that it got; those with fewer than two tell nothing.

    Returns:
        None if no question has two answers, or if all answers are one name, where alpha has no value.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    pairable = [Counter(question) for question in answers if len(question) > 1]
    totals = sum(pairable, Counter())
    count = totals.total()
    expected = count**2 - sum(n * n for n in totals.values())
    if not expected:
        return None
    observed = sum((unit.total() ** 2 - sum(n * n for n in unit.values())) / (unit.total() - 1) for unit in pairable)
    return 1 - (count - 1) * observed / expected


def fleiss_kappa(answers: Sequence[Sequence[str]]) -> float | None:
    """Fleiss' kappa over the questions with the most frequent number of answers (of two or more).

    Args:
        answers: for each question the answers that it got.

    Returns:
        None if there are no such questions, or if all answers are one name.

    Source: Fleiss, Measuring nominal scale agreement among many raters (1971).
    """
    sizes = Counter(len(question) for question in answers if len(question) > 1)
    if not sizes:
        return None
    size = max(sizes, key=lambda n: (sizes[n], n))
    kept = [question for question in answers if len(question) == size]
    totals = sum((Counter(question) for question in kept), Counter())
    chance = sum((n / totals.total()) ** 2 for n in totals.values())
    if chance == 1:
        return None
    return (sum(map(_agreement, kept)) / len(kept) - chance) / (1 - chance)


def _agreement(question: Sequence[str]) -> float:
    """Share of the pairs of answers that are the same."""
    size = len(question)
    return sum(n * (n - 1) for n in Counter(question).values()) / (size * (size - 1))
