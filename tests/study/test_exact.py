"""Exact tests against sums over all sequences of votes, and against drawn votes."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from lego_pipeline.study import exact


@pytest.mark.parametrize("counts", [(5, 1), (3, 3), (6, 1, 0), (3, 2, 2), (4, 1, 1, 0)])
def test_equal_shares_is_the_sum_over_all_sequences(counts: tuple[int, ...]) -> None:
    total, kinds = sum(counts), len(counts)

    def ways(tallied: list[int]) -> int:
        return math.factorial(total) // math.prod(map(math.factorial, tallied))

    rare = 0
    for votes in itertools.product(range(kinds), repeat=total):
        tally = Counter(votes)
        rare += ways([tally[kind] for kind in range(kinds)]) <= ways(list(counts))
    result = exact.equal_shares_test(counts)
    assert result.p == pytest.approx(rare / kinds**total)
    assert result.method == "exact multinomial"


def test_two_answers_give_the_binomial_test() -> None:
    assert exact.equal_shares_test((9, 2)).p == pytest.approx(exact.sign_test(9, 2).p)
    assert exact.sign_test(9, 2).p == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert exact.sign_test(0, 0).p == 1


def test_drawn_outcomes_agree_with_enumerated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (14, 8, 6, 7)
    enumerated = exact.equal_shares_test(counts)
    monkeypatch.setattr(exact, "MOST_OUTCOMES", 0)
    drawn = exact.equal_shares_test(counts)
    assert drawn.method != enumerated.method
    assert drawn.p == pytest.approx(enumerated.p, abs=0.015)


def test_wilson_is_the_closed_form() -> None:
    count, total, z = 7, 20, 1.959963984540054
    share = count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    assert exact.wilson_interval(count, total) == pytest.approx((middle - half, middle + half))
    assert exact.wilson_interval(0, 10)[0] == 0 and exact.wilson_interval(0, 10)[1] > 0.2
    assert exact.wilson_interval(0, 0) == (0, 1)


def test_votes_that_raters_cast_together_count_once_for_the_exchange_test() -> None:
    """Six questions, in each of which ten raters say the same: six coins, not sixty."""
    together = np.array([[10, 0]] * 5 + [[0, 10]])
    exchanged = exact.exchange_test(together)
    coins = sum(math.comb(6, k) for k in (0, 1, 5, 6)) / 2**6
    assert exchanged.p == pytest.approx(coins, abs=0.015)
    assert exact.equal_shares_test([50, 10]).p < 1e-6


def test_the_exchange_test_is_level_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "DRAWS", 200)
    rng = np.random.default_rng(1)
    p = [exact.exchange_test(rng.multinomial(3, [1 / 3] * 3, size=20), seed).p for seed in range(150)]
    assert np.mean(np.array(p) < 0.2) == pytest.approx(0.2, abs=0.08)
