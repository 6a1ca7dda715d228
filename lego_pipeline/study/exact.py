"""Exact tests for counts of votes, with the intervals that go with them.

Votes on one question are not independent: raters see the same pictures. `exchange_test` and `sign_test` take the
question as the unit and hold whatever raters of one question have in common; `equal_shares_test` takes every vote as
independent, as tables of user studies often do, and is given beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
MOST_OUTCOMES = 50_000  # that are enumerated


@dataclass(frozen=True)
class Result:
    """A test's result.

    Attributes:
        p: the p-value.
        method: how it was computed, in words.
    """

    p: float
    method: str


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share of independent answers; (0, 1) without any.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    from scipy.stats import binomtest

    if not total:
        return 0.0, 1.0
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def sign_test(won: int, lost: int) -> Result:
    """Whether one of two wins more often than a coin would; exact binomial, two-sided, ties left out before."""
    from scipy.stats import binomtest

    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Result(p, "exact binomial")


def equal_shares_test(counts: Sequence[int], seed: int = 0) -> Result:
    """Whether all answers are equally likely: multinomial, the sum over all outcomes no likelier than this one.

    Args:
        counts: of each answer.
        seed: of the draws, where there are too many outcomes to enumerate.
    """
    total, kinds = sum(counts), len(counts)
    own = _log_ways(sorted(counts))
    if math.comb(total + kinds - 1, kinds - 1) / math.factorial(kinds) <= MOST_OUTCOMES:
        p = sum(
            math.exp(ways + _log_orders(outcome) - total * math.log(kinds))
            for outcome in _outcomes(total, kinds, total)
            if (ways := _log_ways(outcome)) <= own + 1e-9
        )
        return Result(min(1.0, p), "exact multinomial")
    drawn = np.random.default_rng(seed).multinomial(total, [1 / kinds] * kinds, size=DRAWS)
    factorials = np.cumsum(np.log(np.maximum(1, np.arange(total + 1))))
    as_rare = (factorials[total] - factorials[drawn].sum(1)) <= own + 1e-9
    return Result((int(as_rare.sum()) + 1) / (DRAWS + 1), f"multinomial, {DRAWS} draws")


def exchange_test(votes: np.ndarray, seed: int = 0) -> Result:
    """Whether systems differ at all, when within each question the systems' names could be exchanged.

    Args:
        votes: (questions, systems), number of votes of each system in each question.
        seed: of the exchanges.

    The statistic is the sum of squares of the systems' totals.
    """
    rng = np.random.default_rng(seed)
    own = (votes.sum(0) ** 2).sum()
    extreme = sum(int((rng.permuted(votes, axis=1).sum(0) ** 2).sum() >= own) for _ in range(DRAWS))
    return Result((extreme + 1) / (DRAWS + 1), f"names exchanged within questions, {DRAWS} draws")


def _log_ways(counts: Sequence[int]) -> float:
    """Logarithm of the number of sequences with these counts."""
    return math.lgamma(sum(counts) + 1) - sum(math.lgamma(count + 1) for count in counts)


def _log_orders(counts: Sequence[int]) -> float:
    """Logarithm of the number of ways to give sorted counts to the answers."""
    repeated = [list(counts).count(count) for count in set(counts)]
    return math.lgamma(len(counts) + 1) - sum(math.lgamma(times + 1) for times in repeated)


def _outcomes(total: int, kinds: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All sorted counts of so many answers that add up to the total, none above the largest."""
    if kinds == 1:
        if total <= largest:
            yield (total,)
        return
    for first in range(min(total, largest), -(-total // kinds) - 1, -1):
        for rest in _outcomes(total - first, kinds - 1, first):
            yield (first, *rest)
