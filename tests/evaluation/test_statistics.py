"""Intervals and paired tests of tables, against values that are known."""

import numpy as np
import pytest

from lego_pipeline.evaluation import statistics
from lego_pipeline.evaluation.statistics import bootstrap_interval, holm, jackknife_interval, paired_difference


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


def test_cases_of_one_video_do_not_count_as_many():
    rng = np.random.default_rng(2)
    videos = [number // 10 for number in range(400)]
    values = (np.repeat(rng.normal(0, 1, 40), 10) + rng.normal(0, 0.01, 400)).tolist()
    plain, clustered = bootstrap_interval(values), bootstrap_interval(values, clusters=videos)
    assert clustered.mean == plain.mean
    # 40 independent values, and not 400: the interval is wider by the root of ten.
    assert clustered.high - clustered.low == pytest.approx((plain.high - plain.low) * 10**0.5, rel=0.15)
    _, p_plain = paired_difference(values, [0.15] * 400)
    _, p_clustered = paired_difference(values, [0.15] * 400, clusters=videos)
    assert p_clustered > 10 * p_plain


def test_clusters_of_different_sizes_keep_the_mean_of_all_cases():
    interval = bootstrap_interval([1.0, 1.0, 1.0, 5.0], clusters=["a", "a", "a", "b"])
    assert interval.mean == 2.0 and (interval.low, interval.high) == (1.0, 5.0)


def test_every_case_its_own_cluster_is_no_cluster():
    values = np.random.default_rng(3).normal(size=50).tolist()
    clustered, plain = bootstrap_interval(values, clusters=range(50)), bootstrap_interval(values)
    assert (clustered.low, clustered.high) == pytest.approx((plain.low, plain.high), abs=1e-12)


def test_resamples_in_parts_are_those_of_one_draw(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(4).normal(size=30).tolist()
    whole = paired_difference(values, [0.0] * 30)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 1000)
    assert paired_difference(values, [0.0] * 30) == whole


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(5).normal(3, 2, 200)
    groups = np.arange(200) % 20
    left_out = [values[groups != group].mean() for group in range(20)]
    interval, p_value = jackknife_interval(values.mean(), left_out, 200)
    half = 2.093 * values.std(ddof=1) / 200**0.5  # t of 19 degrees of freedom
    assert interval.mean - interval.low == pytest.approx(half, rel=0.25)
    assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low)
    assert p_value < 1e-6
    assert jackknife_interval(0.0, [0.1, -0.1, 0.0], 9)[1] == 1.0


def test_holm_corrects_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_cluster_must_be_named_for_each_case():
    with pytest.raises(ValueError, match="`clusters`"):
        bootstrap_interval([1.0, 2.0], clusters=["a"])
