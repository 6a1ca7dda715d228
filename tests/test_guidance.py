"""Passes and combination of two-scale guidance, against the formula with all three passes."""

import itertools
import math

import pytest
import torch

from lego_pipeline import guidance

SCALES = (0.0, 0.5, 1.0, 1.5, 7.5)


def plain(condition, middle, null, s_text, s_image):
    return null + s_text * (condition - middle) + s_image * (middle - null)


@pytest.fixture
def predictions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, 4, 4, generator=generator) for name in guidance.PASSES}


@pytest.mark.parametrize(("s_text", "s_image"), list(itertools.product(SCALES, SCALES)))
def test_leaving_out_a_pass_equals_the_formula_with_three(predictions, s_text, s_image):
    passes = guidance.needed_passes(s_text, s_image)
    stacked = torch.cat([predictions[name] for name in passes])
    expected = plain(predictions["C"], predictions["M"], predictions["U"], s_text, s_image)
    torch.testing.assert_close(guidance.combine(stacked, passes, s_text, s_image), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("s_text", "s_image", "passes"),
    [
        (7.5, 1.5, ("C", "M", "U")),
        (7.5, 1.0, ("C", "M")),
        (1.5, 1.5, ("C", "U")),
        (0.0, 1.5, ("M", "U")),
        (1.0, 1.0, ("C",)),
        (0.0, 1.0, ("M",)),
        (0.0, 0.0, ("U",)),
    ],
)
def test_only_passes_with_a_factor_are_run(s_text, s_image, passes):
    assert guidance.needed_passes(s_text, s_image) == passes


def test_scales_per_sample_equal_one_call_per_sample(predictions):
    s_text, s_image = [7.5, 1.0], [1.0, 1.0]
    passes = guidance.needed_passes(s_text, s_image)
    combined = guidance.combine(torch.cat([predictions[name] for name in passes]), passes, s_text, s_image)
    for i in range(2):
        parts = [predictions[name][i] for name in guidance.PASSES]
        torch.testing.assert_close(combined[i], plain(*parts, s_text[i], s_image[i]), atol=1e-5, rtol=1e-6)


def test_a_pass_that_one_sample_needs_is_run_for_all():
    assert guidance.needed_passes([1.0, 7.5], 1.0) == ("C", "M")


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.0, 1.0), [0, 1, 2, 3]), ((0.25, 0.75), [1, 2]), ((0.0, 0.0), []), ((0.5, 1.0), [2, 3])],
)
def test_the_interval_counts_in_fractions_of_the_steps(interval, guided):
    assert [step for step in range(4) if guidance.is_guided(step, 4, interval)] == guided


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf, "7", True, None])
def test_a_scale_that_is_no_finite_number_is_refused_by_name(scale):
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number"):
        guidance.check_scale("guidance_scale", scale, 1)


def test_scales_that_fit_no_batch_are_refused():
    with pytest.raises(ValueError, match=r"one per sample \(2\), got 3"):
        guidance.check_scale("guidance_scale", [1.0, 2.0, 3.0], 2)
