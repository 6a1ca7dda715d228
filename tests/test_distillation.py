"""Formulas of consistency distillation, against diffusers' DDIM and LCM schedulers and against the pipeline itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lego_pipeline.diffusion_step import Denoiser
from lego_pipeline.distillation import (
    ADAPTED,
    ConsistencyPath,
    Student,
    Teacher,
    consistency_losses,
    kept_share,
    student_scheduler,
)
from lego_pipeline.export import with_weights
from lego_pipeline.lora import add_lora
from lego_pipeline.pipeline_lego import LegoPipeline

STEPS = 5  # of the teacher's solver: its grid is 199, 399, ..., 999
TYPES = ["epsilon", "v_prediction", "sample"]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path_of(prediction_type: str) -> ConsistencyPath:
    ddim = DDIMScheduler(**NOISE, prediction_type=prediction_type)
    return ConsistencyPath(student_scheduler(ddim, STEPS))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("timestep", [199, 599, 999])
def test_a_step_of_the_solver_is_that_of_ddim(prediction_type: str, timestep: int) -> None:
    options: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction_type}
    ddim = DDIMScheduler(**NOISE, **options)
    ddim.set_timesteps(STEPS)
    prediction, noisy = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    expected: Any = ddim.step(prediction, timestep, noisy)
    found = path_of(prediction_type).solve(prediction, noisy, torch.tensor([timestep] * 2))
    torch.testing.assert_close(found, expected.prev_sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_what_the_student_is_taken_to_say_is_what_its_scheduler_draws(prediction_type: str) -> None:
    path = path_of(prediction_type)
    path.scheduler.set_timesteps(STEPS)
    prediction, noisy = noise(1, 4, 3, 3), noise(1, 4, 3, 3, seed=1)
    expected: Any = path.scheduler.step(prediction, 999, noisy)
    found = path.consistent(prediction, noisy, torch.tensor([999]))
    torch.testing.assert_close(found, expected.denoised, atol=1e-5, rtol=0)


def test_at_the_end_of_the_path_the_student_has_to_return_what_it_is_given() -> None:
    noisy = noise(2, 4, 3, 3)
    assert torch.equal(path_of("epsilon").consistent(noise(2, 4, 3, 3, seed=1), noisy, torch.tensor([0, 0])), noisy)


def test_timesteps_of_the_grid_are_those_that_the_student_draws_at() -> None:
    path = path_of("epsilon")
    path.scheduler.set_timesteps(STEPS)
    grid = path.on_grid(torch.arange(1000))
    assert sorted(set(grid.tolist())) == sorted(path.scheduler.timesteps.tolist()) == [199, 399, 599, 799, 999]
    assert grid[[0, 199, 200, 999]].tolist() == [199, 199, 399, 999]
    assert path.previous(torch.tensor([199, 399, 999])).tolist() == [0, 199, 799]
    assert [path.step_number(timestep) for timestep in (999, 799, 199)] == [0, 1, 4]


def test_a_grid_that_does_not_divide_the_timesteps_stays_on_it() -> None:
    path = ConsistencyPath(student_scheduler(DDIMScheduler(**NOISE), 3))
    assert set(path.on_grid(torch.arange(1000)).tolist()) == {332, 665, 998}


@pytest.fixture
def batch(tiny_pipeline: LegoPipeline) -> dict[str, torch.Tensor]:
    """What `Inputs` gives, for two samples with all parts of the condition."""
    sizes = tiny_pipeline.projector.config
    with torch.no_grad():
        return {
            "noisy": noise(2, 6, 8, 8),
            "image_latents": noise(2, 6, 8, 8, seed=1),
            "timestep": torch.tensor([999, 999]),
            "prompt_embeds": tiny_pipeline.encode_prompt(["open drawer", "cut"]),
            "image_embeds": noise(2, sizes["num_image_tokens"], sizes["vlm_dim"], seed=2),
            "text_embeds": noise(2, sizes["num_text_tokens"], sizes["vlm_dim"], seed=3),
            "no_vlm": torch.tensor([False, True]),
            "null_condition": tiny_pipeline.encode_null_condition(),
            "weights": torch.ones(2, 8, 8),
        }


def teacher_of(pipeline: LegoPipeline, interval: tuple[float, float] = (0.0, 1.0)) -> Teacher:
    path = ConsistencyPath(student_scheduler(pipeline.scheduler, STEPS))
    denoiser = Denoiser(pipeline.unet, pipeline.projector, 0.0).eval()
    return Teacher(denoiser, path, guidance_scale=7.5, image_guidance_scale=1.5, guidance_interval=interval)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.5, 1.0)], ids=["guided", "first step unguided"])
def test_the_teachers_step_is_the_first_of_a_guided_call(
    interval: tuple[float, float], tiny_pipeline: LegoPipeline, batch: dict[str, torch.Tensor]
) -> None:
    teacher = teacher_of(tiny_pipeline, interval)
    with torch.no_grad():
        condition = teacher.denoiser.condition(batch)
        ddim = DDIMScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
        tiny_pipeline.register_modules(scheduler=ddim)
        seen: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
            seen.append(tensors["latents"])

        tiny_pipeline.denoise(
            batch["noisy"],
            condition,
            batch["null_condition"],
            batch["image_latents"],
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            guidance_interval=interval,
            callback_on_step_end=keep,
        )
    torch.testing.assert_close(teacher.step(batch, condition), seen[0], atol=1e-5, rtol=1e-5)


def test_guidance_is_off_where_the_interval_leaves_a_step_out(tiny_pipeline: LegoPipeline) -> None:
    teacher = teacher_of(tiny_pipeline, (0.2, 0.6))
    assert teacher.scales(torch.tensor([999, 799, 599, 399, 199])) == ([1, 7.5, 7.5, 1, 1], [1, 1.5, 1.5, 1, 1])


def test_the_loss_is_the_students_distance_from_its_average_a_step_further(
    tiny_pipeline: LegoPipeline, batch: dict[str, torch.Tensor]
) -> None:
    teacher = teacher_of(tiny_pipeline)
    path = teacher.path
    calls: dict[str, torch.Tensor] = {}

    def said(name: str, value: torch.Tensor) -> Callable[..., torch.Tensor]:
        def predict(noisy: torch.Tensor, timestep: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            calls[name] = noisy
            assert timestep.tolist() == ([999, 999] if name == "student" else [799, 799])
            return value

        return predict

    weight, shown = torch.ones(2, 6, 8, 8, requires_grad=True), torch.zeros(2, 6, 8, 8, requires_grad=True)
    batch["weights"][0, :, :4] = 3.0
    losses = consistency_losses(said("student", weight), said("average", shown), teacher, batch)
    with torch.no_grad():
        earlier = teacher.step(batch, teacher.denoiser.condition(batch))
        assert torch.equal(calls["student"], batch["noisy"])
        assert torch.equal(calls["average"], earlier)
        found = path.consistent(weight, batch["noisy"], torch.tensor([999, 999]))
        aim = path.consistent(shown, earlier, torch.tensor([799, 799]))
        error = (found - aim).abs().mean(1)
        expected = (error * batch["weights"]).sum((1, 2)) / batch["weights"].sum((1, 2))
    torch.testing.assert_close(losses, expected, atol=2e-3, rtol=0)  # the loss is blunt below 0.001
    losses.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert shown.grad is None


def test_a_pass_of_the_student_learns_to_be_the_guided_teachers(
    make_tiny_pipeline: Callable[..., LegoPipeline], batch: dict[str, torch.Tensor]
) -> None:
    pipe = make_tiny_pipeline()
    kind = type(pipe.scheduler)
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config, prediction_type="sample"))
    teacher = teacher_of(pipe)
    teacher.denoiser.unet = with_weights(pipe.unet, pipe.unet.state_dict()).eval()
    add_lora(pipe.unet, 8, 8, targets=ADAPTED)
    student = Student(pipe.unet)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    batch["timestep"] = torch.tensor([199, 199])  # whose aim is what the teacher makes of it
    losses = []
    for _ in range(30):
        loss = consistency_losses(student, student, teacher, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_kept_share_is_that_of_the_gain_over_copying() -> None:
    assert kept_share(student=0.6, teacher=0.5, copied=1.0) == pytest.approx(0.8)
    assert kept_share(student=0.6, teacher=1.0, copied=1.0) is None


def test_a_student_has_the_teachers_noise_levels_with_zero_signal_at_the_end_too() -> None:
    ddim = DDIMScheduler(**NOISE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    student = student_scheduler(ddim, STEPS)
    torch.testing.assert_close(student.alphas_cumprod, ddim.alphas_cumprod)
    assert student.alphas_cumprod[-1] < 1e-6
    path, noisy = ConsistencyPath(student), noise(1, 4, 3, 3)
    assert path.solve(noise(1, 4, 3, 3, seed=1), noisy, torch.tensor([999])).isfinite().all()
    epsilon = DDIMScheduler(**NOISE, prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="`pipeline` must not predict the noise where its last timestep is noise"):
        student_scheduler(epsilon, STEPS)


def test_noise_levels_that_the_students_scheduler_does_not_know_are_refused() -> None:
    for other in (DDPMScheduler(beta_schedule="sigmoid"), DDIMScheduler(**NOISE)):
        if isinstance(other, DDIMScheduler):
            other.alphas_cumprod = other.alphas_cumprod * 0.9
        with pytest.raises(ValueError, match="`pipeline` must have noise levels that an LCMScheduler knows"):
            student_scheduler(other, STEPS)
    with pytest.raises(ValueError, match="`teacher_steps` must be at least 1 and at most the 100 timesteps, got 200"):
        student_scheduler(DDIMScheduler(num_train_timesteps=100), 200)
