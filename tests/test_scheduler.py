"""The scheduler against the released sampler's arrays, against diffusers' schedulers, and as a component."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from lego_pipeline import scheduler as scheduler_module
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.scheduler import LegoEulerAncestralScheduler

PARITY = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference")) / "parity"
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = 0.0291675, 14.614643  # noise levels of the first and the last timestep trained

needs_reference = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"no reference arrays in {PARITY}; set LEGO_REFERENCE_DIR"
)


def reference(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(PARITY / name).items()}


STEPS = sorted(
    int(name.removeprefix("sigmas_"))
    for name in (reference("e_schedule.npz") if PARITY.is_dir() else ())
    if name.startswith("sigmas_")
)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).abs() / theirs.double().abs().clamp_min(1e-12)).max().item()


def run(scheduler: LegoEulerAncestralScheduler, steps: int = 5, seed: int = 0) -> torch.Tensor:
    """Latents (2, 4, 3, 3) after sampling with a model that predicts a mild function of its input."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents = torch.randn(2, 4, 3, 3, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = 0.9 * torch.tanh(scheduler.scale_model_input(latents, t) + t / 2000)
        latents = scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
    return latents


# --- Parity with the release -------------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize("steps", STEPS)
def test_noise_levels_and_timesteps_are_the_releases(steps: int) -> None:
    arrays, scheduler = reference("e_schedule.npz"), LegoEulerAncestralScheduler()
    scheduler.set_timesteps(steps)
    assert relative_error(scheduler.sigmas[:-1], arrays[f"sigmas_{steps}"][:-1]) < 1e-5
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.timesteps - arrays[f"timesteps_{steps}"]).abs().max() < 1e-3


@needs_reference
@pytest.mark.parametrize("steps", STEPS)
def test_ancestral_levels_are_the_releases(steps: int) -> None:
    arrays = reference("e_schedule.npz")
    sigmas = arrays[f"sigmas_{steps}"].tolist()
    levels = [scheduler_module._ancestral_levels(*pair, 1.0) for pair in zip(sigmas, sigmas[1:], strict=False)]
    down, up = torch.tensor(levels).T
    assert torch.allclose(down, arrays[f"sigma_down_{steps}"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(up, arrays[f"sigma_up_{steps}"], rtol=1e-5, atol=1e-7)


@needs_reference
def test_the_steps_of_a_run_are_the_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, scheduler = reference("f_sampler.npz"), LegoEulerAncestralScheduler()
    noises = iter(arrays["step_noises"])
    monkeypatch.setattr(scheduler_module, "randn_tensor", lambda *_, **__: next(noises))
    expected = [*arrays["x_before_each_step"], arrays["final_latent"]]
    scheduler.set_timesteps(len(arrays["denoised_each_step"]))
    latents = arrays["initial_noise"] * scheduler.init_noise_sigma
    for i, (t, denoised) in enumerate(zip(scheduler.timesteps, arrays["denoised_each_step"], strict=True)):
        assert (latents - expected[i]).abs().max() < 2e-3
        output = (expected[i] - denoised) / scheduler.sigmas[i]
        latents, clean = scheduler.step(output.float(), t, latents, return_dict=False)
        assert (clean - denoised).abs().max() < 2e-3
    assert (latents - expected[-1]).abs().max() < 2e-3
    assert next(noises, None) is None  # one draw less than steps, none left over


# --- Against formulas and diffusers ------------------------------------------------------------------------------


def test_levels_are_interpolated_in_the_logarithm() -> None:
    scheduler = LegoEulerAncestralScheduler()
    scheduler.set_timesteps(1000)
    whole = scheduler.sigmas[:-1].flip(0)  # of timesteps 0 ... 999
    assert whole[0].item() == pytest.approx(LEVELS[0], rel=1e-5)
    assert whole[-1].item() == pytest.approx(LEVELS[1], rel=1e-6)
    scheduler.set_timesteps(7)  # the second timestep is 832.5
    assert scheduler.sigmas[1].item() == pytest.approx((whole[832] * whole[833]).sqrt().item(), rel=1e-12)
    assert scheduler.sigmas.dtype == torch.float64


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_noise_it_is_diffusers_euler(prediction_type: str) -> None:
    theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace", prediction_type=prediction_type)
    ours = LegoEulerAncestralScheduler(prediction_type=prediction_type, eta=0)
    assert torch.allclose(run(ours), run(theirs), rtol=0, atol=2e-4)  # they interpolate levels linearly


def test_with_noise_it_is_diffusers_ancestral_euler() -> None:
    theirs = EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace")
    assert torch.allclose(run(LegoEulerAncestralScheduler()), run(theirs), rtol=0, atol=1e-3)


def test_the_last_step_draws_no_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    scheduler = LegoEulerAncestralScheduler()
    scheduler.set_timesteps(1)
    before = generator.get_state()
    scheduler.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2), generator)
    assert torch.equal(generator.get_state(), before)


def test_eta_scales_the_noise_and_keeps_its_sum() -> None:
    for eta in (0.0, 0.4, 1.0):
        down, up = scheduler_module._ancestral_levels(5.0, 3.0, eta)
        assert math.hypot(down, up) == pytest.approx(3.0)
        assert up == pytest.approx(eta * 3.0 * 4.0 / 5.0)
    assert torch.equal(run(LegoEulerAncestralScheduler(eta=0)), run(LegoEulerAncestralScheduler(eta=0)))
    assert not torch.allclose(run(LegoEulerAncestralScheduler(eta=0)), run(LegoEulerAncestralScheduler(eta=0.4)))


def test_one_generator_per_sample_makes_samples_independent() -> None:
    scheduler = LegoEulerAncestralScheduler()
    sample, output = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)

    def step(rows: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)][rows]
        scheduler.set_timesteps(3)
        return scheduler.step(output[rows], scheduler.timesteps[0], sample[rows], generators).prev_sample

    assert torch.equal(step(slice(None))[1:], step(slice(1, 2)))


# --- ComfyUI's conventions ---------------------------------------------------------------------------------------


def test_comfyui_conventions_are_whole_timesteps_and_its_start() -> None:
    ours, fractional = LegoEulerAncestralScheduler(conventions="comfyui"), LegoEulerAncestralScheduler()
    for scheduler in (ours, fractional):
        scheduler.set_timesteps(20)
    assert torch.equal(ours.timesteps, ours.timesteps.round())
    assert not torch.equal(fractional.timesteps, fractional.timesteps.round())
    assert (ours.timesteps - fractional.timesteps).abs().max() < 0.52
    assert relative_error(ours.sigmas[:-1], fractional.sigmas[:-1]) < 5e-5
    assert ours.init_noise_sigma == pytest.approx(math.sqrt(1 + LEVELS[1] ** 2), rel=1e-6)
    assert fractional.init_noise_sigma == pytest.approx(LEVELS[1], rel=1e-6)


# --- As a component ----------------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_with_its_settings(tmp_path: Path) -> None:
    LegoEulerAncestralScheduler(eta=0.5, conventions="comfyui", prediction_type="sample").save_pretrained(tmp_path)
    loaded = LegoEulerAncestralScheduler.from_pretrained(tmp_path)
    assert loaded.config["eta"] == 0.5
    assert (loaded.config["conventions"], loaded.config["prediction_type"]) == ("comfyui", "sample")


def test_it_takes_over_another_schedulers_config_and_gives_its_own() -> None:
    theirs = EulerDiscreteScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear", prediction_type="sample")
    ours = LegoEulerAncestralScheduler.from_config(theirs.config, eta=0)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5, atol=0)
    assert ours.config["prediction_type"] == "sample"
    assert EulerDiscreteScheduler.from_config(ours.config).config["beta_schedule"] == "linear"


def test_a_saved_pipeline_brings_it_back(
    make_tiny_pipeline: Callable[..., LegoPipeline], frame: object, tmp_path: Path
) -> None:
    scheduler = LegoEulerAncestralScheduler(conventions="comfyui", eta=1.0)
    pipe = make_tiny_pipeline(scheduler=scheduler, vlm=None, vlm_processor=None, vlm_dropout=True)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = LegoPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is LegoEulerAncestralScheduler
    images = [
        p(frame, "open drawer", generator=torch.Generator().manual_seed(1), output_type="np").images
        for p in (pipe, loaded)
    ]
    assert np.array_equal(*images)


def test_a_stable_diffusion_pipeline_runs_with_it(make_tiny_pipeline: Callable[..., LegoPipeline]) -> None:
    tiny = make_tiny_pipeline()
    parts = {name: getattr(tiny, name) for name in ("vae", "text_encoder", "tokenizer")}
    unet = type(tiny.unet).from_config(dict(tiny.unet.config) | {"in_channels": 6})
    pipe = StableDiffusionPipeline(
        **parts,
        unet=unet,
        scheduler=LegoEulerAncestralScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe("open", num_inference_steps=2, height=32, width=32, output_type="np", generator=generator)
    assert np.isfinite(out.images).all()


def test_it_starts_in_the_middle() -> None:
    scheduler = LegoEulerAncestralScheduler(eta=0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    clean, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[2:3])
    assert torch.allclose(noisy, scheduler.sigmas[2].float() * noise)
    scheduler.scale_model_input(noisy, scheduler.timesteps[2])
    assert scheduler.step_index == 2
    output = scheduler.step(noise, scheduler.timesteps[2], noisy)
    assert torch.allclose(output.pred_original_sample, clean, atol=1e-6)
    assert torch.allclose(output.prev_sample, scheduler.sigmas[3].float() * noise)
    assert scheduler.step_index == 3


def test_half_precision_goes_in_and_comes_out() -> None:
    scheduler = LegoEulerAncestralScheduler()
    scheduler.set_timesteps(3)
    sample = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    output = scheduler.step(
        sample, scheduler.timesteps[0], scheduler.scale_model_input(sample, scheduler.timesteps[0])
    )
    assert output.prev_sample.dtype == torch.float16


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"conventions": "comfy"}, "`conventions` must be one of 'k-diffusion', 'comfyui', got 'comfy'"),
        ({"prediction_type": "flow"}, "`prediction_type` must be one of 'epsilon', 'v_prediction', 'sample'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "`beta_schedule` must be one of 'linear', 'scaled_linear'"),
        ({"eta": -0.1}, "`eta` must be between 0 and 1, got -0.1"),
    ],
)
def test_a_wrong_setting_is_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        LegoEulerAncestralScheduler(**setting)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be between 1 and 1000, got {steps}"):
        LegoEulerAncestralScheduler().set_timesteps(steps)


def test_a_timestep_of_another_run_is_refused() -> None:
    scheduler = LegoEulerAncestralScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` must be one of the scheduler's `timesteps`, got 17"):
        scheduler.scale_model_input(torch.ones(1, 1, 2, 2), 17.0)
