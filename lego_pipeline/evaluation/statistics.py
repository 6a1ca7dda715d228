"""Intervals and paired tests for tables: both resample the cases, so they ask nothing of the values' distribution.

Cases that come from one video resemble one another, and an interval that takes them as independent is too narrow.
Given `clusters`, whole clusters are drawn or flipped instead of cases. A distance between two sets of frames has no
value of its own for a case; `jackknife_interval` is for those.

The same values give the same numbers: random draws come from a seed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 5000
LEVEL = 0.95
DRAWN_AT_ONCE = 4_000_000  # numbers in memory


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        mean: of the values.
        low, high: 95 % interval of the mean.
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


def bootstrap_interval(values: Sequence[float], seed: int = 0, clusters: Sequence[Hashable] | None = None) -> Interval:
    """Mean of some values with its 95 % percentile bootstrap interval.

    Args:
        values: one for each case.
        seed: of the resampling.
        clusters: what each case belongs to, such as its video; None takes cases as independent.

    Raises:
        ValueError: no values, one that is not finite, or another number of clusters.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    array = _checked(values)
    sums, counts = _cluster_sums(array, clusters)
    rng, means = np.random.default_rng(seed), []
    for part in _parts(len(sums)):
        drawn = rng.integers(len(sums), size=(part, len(sums)))
        means.append(sums[drawn].mean(1) if clusters is None else sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def paired_difference(
    first: Sequence[float], second: Sequence[float], seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> tuple[Interval, float]:
    """Mean of first - second over the same cases with its interval, and the p-value of a sign-flip test.

    Args:
        first, second: values of two systems for the same cases in the same order.
        seed: of the resampling.
        clusters: what each case belongs to; the differences of a cluster get one sign together.

    Returns:
        The interval, and the two-sided p-value for "the sign of a case's difference is chance".

    Raises:
        ValueError: different lengths, no values, or one that is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"`first` and `second` must have a value for each case, got {len(first)} and {len(second)}.")
    differences = _checked(first) - _checked(second)
    sums, _ = _cluster_sums(differences, clusters)
    rng, by_chance = np.random.default_rng(seed), 0
    for part in _parts(len(sums)):
        flips = rng.choice([-1.0, 1.0], size=(part, len(sums)))
        by_chance += (np.abs((flips * sums).sum(1) / len(differences)) >= abs(differences.mean()) - 1e-12).sum()
    p_value = (by_chance + 1) / (RESAMPLES + 1)
    return bootstrap_interval(differences.tolist(), seed, clusters), float(p_value)


def jackknife_interval(estimate: float, left_out: Sequence[float], count: int) -> tuple[Interval, float]:
    """Interval of a number that belongs to a whole set, such as a Frechet distance, from leaving out groups in turn.

    A bootstrap would not do: a set drawn with repetition is farther from any other set than the set itself.

    Args:
        estimate: of all cases.
        left_out: of all cases but those of one group, for each of G groups of about equal size.
        count: number of cases.

    Returns:
        estimate -+ t s with s^2 = (G - 1) / G sum (x - mean)^2 and t of G - 1 degrees of freedom, and the two-sided
        p-value of the same t test for "the number is 0", which serves differences of two systems.

    Raises:
        ValueError: fewer than two groups.

    Source: Efron and Tibshirani (1993), chapter 11.
    """
    from scipy.stats import t

    groups = _checked(left_out)
    if len(groups) < 2:
        raise ValueError(f"`left_out` must have a number for each of at least two groups, got {len(groups)}.")
    error = float(np.sqrt((len(groups) - 1) * groups.var()))
    half = float(t.ppf((1 + LEVEL) / 2, len(groups) - 1)) * error
    if error:
        p_value = float(2 * t.sf(abs(estimate) / error, len(groups) - 1))
    else:
        p_value = float(estimate == 0)
    return Interval(estimate, estimate - half, estimate + half, count), p_value


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected so that the chance of any false finding is that of one test.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"`values` must be at least one finite number, got {len(array)} with some that aren't.")
    return array


def _cluster_sums(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of values of each cluster, in the order in which clusters appear; a case is its own without."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"`clusters` must name one for each case, got {len(clusters)} for {len(values)} values.")
    number_of = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    numbers = np.array([number_of[cluster] for cluster in clusters])
    return np.bincount(numbers, values), np.bincount(numbers).astype(float)


def _parts(width: int) -> list[int]:
    """The resamples in parts that fit into memory; the draws are the same as all at once."""
    most = max(1, DRAWN_AT_ONCE // width)
    return [min(most, RESAMPLES - first) for first in range(0, RESAMPLES, most)]
