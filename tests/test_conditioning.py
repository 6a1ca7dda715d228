"""Condition dropout: which draw loses what, and the release's own facts about it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lego_pipeline.conditioning import drop_conditions

PARITY = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference")) / "parity"
CONDITION, NULL, LATENTS = torch.full((1, 5, 4), 2.0), torch.full((1, 5, 4), -1.0), torch.full((1, 3, 2, 2), 3.0)


def dropped(draw: float, probability: float = 0.05) -> tuple[bool, bool]:
    """Whether text with the VLM parts, and whether the image, are null for a draw."""
    condition, latents = drop_conditions(CONDITION, NULL, LATENTS, torch.tensor([draw]), probability)
    assert torch.equal(condition, NULL) or torch.equal(condition, CONDITION)
    assert torch.equal(latents, LATENTS) or not latents.any()
    return torch.equal(condition, NULL), not latents.any()


@pytest.mark.parametrize(
    ("draw", "text", "image"),
    [
        (0.0, True, False),
        (0.0499, True, False),
        (0.05, True, True),
        (0.0999, True, True),
        (0.1, False, True),
        (0.1499, False, True),
        (0.15, False, False),
        (0.999, False, False),
    ],
)
def test_each_interval_of_the_draw_drops_its_conditions(draw: float, text: bool, image: bool) -> None:
    assert dropped(draw) == (text, image)


def test_probability_zero_drops_nothing() -> None:
    assert dropped(0.0, probability=0.0) == (False, False)


def test_probability_one_third_keeps_no_sample_whole() -> None:
    assert {dropped(draw, probability=1 / 3) for draw in (0.1, 0.5, 0.9)} == {
        (True, False),
        (True, True),
        (False, True),
    }


@pytest.mark.parametrize("probability", [-0.01, 0.34])
def test_an_impossible_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="`probability` must be between 0 and 1/3"):
        dropped(0.5, probability)


def test_samples_of_a_batch_are_dropped_apart() -> None:
    draws = torch.tensor([0.0, 0.07, 0.12, 0.5])
    condition, latents = drop_conditions(CONDITION.repeat(4, 1, 1), NULL, LATENTS.repeat(4, 1, 1, 1), draws)
    assert (condition[:, 0, 0] == -1).tolist() == [True, True, False, False]
    assert (latents[:, 0, 0, 0] == 0).tolist() == [False, True, True, False]


def test_the_inputs_are_left_as_they_are() -> None:
    condition, latents = CONDITION.clone(), LATENTS.clone()
    drop_conditions(condition, NULL, latents, torch.tensor([0.07]))
    assert torch.equal(condition, CONDITION)
    assert torch.equal(latents, LATENTS)


def test_half_precision_conditions_keep_their_dtype() -> None:
    condition, latents = drop_conditions(CONDITION.half(), NULL, LATENTS.half(), torch.tensor([0.07]))
    assert (condition.dtype, latents.dtype) == (torch.float16, torch.float16)


@pytest.mark.skipif(not PARITY.is_dir(), reason=f"no reference arrays in {PARITY}; set LEGO_REFERENCE_DIR")
def test_the_releases_draws_drop_what_the_release_dropped() -> None:
    facts = {name: torch.from_numpy(array) for name, array in np.load(PARITY / "g_training.npz").items()}
    sequences = {name: torch.from_numpy(array) for name, array in np.load(PARITY / "a_conditioning.npz").items()}
    # Sample i is pair i mod 2; its latent before dropout is that of a sample of the same pair that kept it.
    whole = sequences["cond_sequence"].repeat(4, 1, 1)
    released, draws = facts["concat_latent_after_dropout"], facts["dropout_draw"]
    kept = [next(j for j in range(i % 2, 8, 2) if released[j].any()) for i in range(8)]
    condition, latents = drop_conditions(whole, sequences["uncond_sequence"][:1], released[kept], draws)
    assert torch.allclose(condition, facts["cond_sequence_after_dropout"], atol=1e-5)
    assert torch.equal(latents, released)
