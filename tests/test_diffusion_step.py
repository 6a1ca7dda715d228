"""Targets, weights and losses of a training step, and what the frozen models give to it."""

from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from lego_pipeline.diffusion_step import Denoiser, Inputs, diffusion_target, losses_of, timestep_weights
from lego_pipeline.pipeline_lego import LegoPipeline

ALPHAS = DDIMScheduler().alphas_cumprod


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_are_those_of_the_schedulers(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    scheduler: Any = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    timestep = torch.tensor([400])
    alpha = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timestep)
    target = diffusion_target(prediction_type, clean, noise, alpha)
    scheduler.set_timesteps(1000)
    result = scheduler.step(target, 400, noisy).pred_original_sample
    assert torch.allclose(result, clean, atol=1e-4)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="`prediction_type` must be one of epsilon, v_prediction, sample, got 'flow'"):
        diffusion_target("flow", *[torch.zeros(1)] * 3)


def test_min_snr_weighs_errors_of_all_predictions_as_one_of_clean_latents() -> None:
    """The same error in clean latents, said as eps or as v, has to cost the same."""
    snr = ALPHAS / (1 - ALPHAS)
    of_clean = timestep_weights("sample", ALPHAS, 5.0)
    assert torch.equal(of_clean, snr.clamp(max=5.0))
    # clean error e is an error sqrt(snr) e of eps, and sqrt(snr + 1) e of v
    assert torch.allclose(timestep_weights("epsilon", ALPHAS, 5.0) * snr, of_clean)
    assert torch.allclose(timestep_weights("v_prediction", ALPHAS, 5.0) * (snr + 1), of_clean)
    assert torch.equal(timestep_weights("epsilon", ALPHAS, 0.0), torch.ones(1000))


def test_a_sample_s_loss_is_its_own_weighted_mean() -> None:
    goal = torch.zeros(2, 1, 1, 2)
    prediction = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    weights = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]]])
    model: Any = lambda batch: prediction  # noqa: E731
    assert losses_of(model, {"goal": goal, "weights": weights}).tolist() == [3.0, 4.0]


@pytest.fixture
def loaded(tiny_pipeline: LegoPipeline) -> dict[str, Any]:
    """A batch of two as the data set gives it, on the fly and with embeddings."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, 6, 8, 8, generator=generator)
    return {
        "pixels": torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1,
        "prompt": ["open drawer", "close drawer"],
        "image_embeds": torch.randn(2, 4, 32, generator=generator),
        "text_embeds": torch.randn(2, 6, 32, generator=generator),
        "noise": latents[0],
        "posterior_noise": latents[1],
        "offset": torch.randn(2, 6, 1, 1, generator=generator),
        "timestep": torch.tensor([10, 900]),
        "drop": torch.ones(2),
        "no_vlm": torch.tensor([False, True]),
        "use_label": torch.tensor([False, False]),
        "weights": torch.ones(2, 8, 8),
    }


def test_inputs_follow_the_forward_process(tiny_pipeline: LegoPipeline, loaded: dict[str, Any]) -> None:
    """The frame's latents are the unscaled mode, the target's are sampled and scaled (facts of the release)."""
    batch = Inputs(tiny_pipeline)(loaded)
    before, after = loaded["pixels"].unbind(1)
    with torch.no_grad():
        posterior = tiny_pipeline.vae.encode(after).latent_dist
        mode = tiny_pipeline.vae.encode(before).latent_dist.mode()
    clean = (posterior.mean + posterior.std * loaded["posterior_noise"]) * tiny_pipeline.vae.config["scaling_factor"]
    alpha = tiny_pipeline.scheduler.alphas_cumprod[loaded["timestep"]].reshape(-1, 1, 1, 1)
    assert torch.allclose(batch["image_latents"], mode, atol=1e-5)
    assert torch.allclose(batch["noisy"], alpha.sqrt() * clean + (1 - alpha).sqrt() * loaded["noise"], atol=1e-5)
    assert torch.equal(batch["goal"], loaded["noise"])


def test_offset_noise_shifts_whole_channels(tiny_pipeline: LegoPipeline, loaded: dict[str, Any]) -> None:
    shifted = Inputs(tiny_pipeline, noise_offset=0.1)(loaded)["goal"] - loaded["noise"]
    assert torch.allclose(shifted, 0.1 * loaded["offset"].expand_as(shifted), atol=1e-6)


def test_a_sample_without_the_vlm_sees_zeros_after_the_projections(
    tiny_pipeline: LegoPipeline, loaded: dict[str, Any]
) -> None:
    seen = []
    denoiser = Denoiser(tiny_pipeline.unet, tiny_pipeline.projector, dropout=0.05).eval()
    batch = Inputs(tiny_pipeline)(loaded)
    denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        denoiser(batch)
        expected = tiny_pipeline.projector(batch["prompt_embeds"], batch["image_embeds"], batch["text_embeds"])
    assert torch.allclose(seen[0][0], expected[0], atol=1e-5)
    assert torch.equal(seen[0][1][77:], torch.zeros(10, 32))
    assert torch.allclose(seen[0][1][:77], expected[1][:77], atol=1e-5)


@pytest.mark.parametrize(("parts", "image", "text"), [("image", 1, 0), ("text", 0, 1), ("none", 0, 0)])
def test_a_part_that_is_left_out_is_zeros_and_its_projection_is_not_trained(
    parts: str, image: int, text: int, tiny_pipeline: LegoPipeline, loaded: dict[str, Any]
) -> None:
    seen = []
    tiny_pipeline.unet.requires_grad_(True)
    tiny_pipeline.projector.requires_grad_(True)
    denoiser = Denoiser(tiny_pipeline.unet, tiny_pipeline.projector, dropout=0, vlm_parts=parts).eval()
    denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    batch = Inputs(tiny_pipeline)(loaded)
    denoiser(batch).sum().backward()
    image_tokens = tiny_pipeline.projector.config["num_image_tokens"]
    assert bool(seen[0][0, 77 : 77 + image_tokens].any()) == image
    assert bool(seen[0][0, 77 + image_tokens :].any()) == text
    trained = {name for name, weight in denoiser.projector.named_parameters() if weight.requires_grad}
    assert {name.split("_")[0] for name in trained} == {
        name for name, used in (("image", image), ("text", text)) if used
    }
    assert all(denoiser.projector.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize(("draw", "text", "image"), [(0.04, 0, 1), (0.06, 0, 0), (0.12, 1, 0), (0.2, 1, 1)])
def test_one_draw_drops_the_conditions(
    draw: float, text: bool, image: bool, tiny_pipeline: LegoPipeline, loaded: dict[str, Any]
) -> None:
    seen = []
    denoiser = Denoiser(tiny_pipeline.unet, tiny_pipeline.projector, dropout=0.05).eval()
    inputs = Inputs(tiny_pipeline)
    batch = inputs({**loaded, "drop": torch.full((2,), draw)})
    denoiser.unet.register_forward_pre_hook(lambda module, args: seen.extend((args[0], args[2])))
    with torch.no_grad():
        denoiser(batch)
    assert torch.equal(seen[1][0], inputs.null_condition[0]) != text
    assert torch.equal(seen[0][:, 6:], torch.zeros(2, 6, 8, 8)) != image


def test_generated_descriptions_come_from_the_seed_and_the_sample(
    make_tiny_pipeline: Callable[..., LegoPipeline], tiny_components: dict[str, Any], frame: PIL.Image.Image
) -> None:
    pipe = make_tiny_pipeline()
    pipe.register_to_config(temperature=1.0)
    batch = {"frame": [frame] * 2, "action": ["open drawer"] * 2, "description": [None] * 2}
    batch["sample"] = torch.tensor([3, 4])
    vlm = tiny_components["vlm"], tiny_components["vlm_processor"]
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        texts.append([answer.description for answer in Inputs(pipe, vlm=vlm, seed=seed).enhance(batch)])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_frames_without_embeddings_need_a_vlm(tiny_pipeline: LegoPipeline) -> None:
    with pytest.raises(ValueError, match="`vlm` must be given"):
        Inputs(tiny_pipeline).enhance({"frame": [], "description": []})
