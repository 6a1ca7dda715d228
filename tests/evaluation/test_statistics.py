"""Intervals and paired tests of tables, against values that are known."""

import numpy as np
import pytest

from lego_pipeline.evaluation.statistics import bootstrap_interval, paired_difference


def test_the_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval.count == 400


def test_the_same_values_give_the_same_interval():
    assert bootstrap_interval([0.0, 1.0, 1.0, 0.0]) == bootstrap_interval([0.0, 1.0, 1.0, 0.0])


def test_equal_values_have_no_width():
    interval = bootstrap_interval([2.5] * 7)
    assert (interval.low, interval.high) == (2.5, 2.5)


def test_pairing_finds_what_unpaired_intervals_hide():
    rng = np.random.default_rng(1)
    second = rng.normal(0, 5, 200)
    first = second + rng.normal(0.3, 0.5, 200)
    interval, p_value = paired_difference(first.tolist(), second.tolist())
    assert interval.excludes_zero and p_value < 0.001
    assert bootstrap_interval(first.tolist()).low < bootstrap_interval(second.tolist()).high


def test_the_p_value_is_the_share_of_sign_flips():
    # Differences 1, 1, 1, 0: a flip of the three signs reaches |3/4| in 2 of 8 ways.
    _, p_value = paired_difference([1, 1, 1, 1], [0, 0, 0, 1])
    assert p_value == pytest.approx(0.25, abs=0.02)


def test_no_difference_is_no_finding():
    interval, p_value = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (interval.mean, interval.excludes_zero, p_value) == (0.0, False, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="`values`"):
        bootstrap_interval(values)


def test_cases_must_be_the_same():
    with pytest.raises(ValueError, match="`first` and `second`"):
        paired_difference([1.0], [1.0, 2.0])
