"""Intervals and paired tests for tables: both resample the cases, so they ask nothing of the values' distribution.

The same values give the same numbers: random draws come from a seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 5000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: of the values.
        low, high: 95 % bootstrap interval of the mean.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of some values with its 95 % percentile bootstrap interval.

    Raises:
        ValueError: no values, or one that is not finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    array = _checked(values)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[Interval, float]:
    """Mean of first - second over the same cases with its interval, and the p-value of a sign-flip test.

    Args:
        first, second: values of two systems for the same cases in the same order.
        seed: of the resampling.

    Returns:
        The interval, and the two-sided p-value for "the sign of a case's difference is chance".

    Raises:
        ValueError: different lengths, no values, or one that is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` and `second` must have a value for each case, got {len(first)} and {len(second)}.")
    differences = _checked(first) - _checked(second)
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(differences)))
    by_chance = np.abs((flips * differences).mean(1)) >= abs(differences.mean()) - 1e-12
    p_value = (by_chance.sum() + 1) / (RESAMPLES + 1)
    return bootstrap_interval(differences.tolist(), seed), float(p_value)


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"`values` must be at least one finite number, got {len(array)} with some that aren't.")
    return array
