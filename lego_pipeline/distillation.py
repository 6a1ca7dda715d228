"""Consistency distillation: a student whose single pass lands where the guided teacher's whole path would end.

From latents x_t of a target the teacher's solver (DDIM, both guidance scales) makes one step to x_s, s < t on its own
grid of N timesteps. The student learns to name the same clean latents at x_t as its own average does at x_s; at s = 0
it has to return x_s itself (c_skip, c_out), and so the end of the path spreads upwards. The guidance is part of the
path: the student has it in its weights and needs the pass C alone.

Source: Luo et al., "Latent Consistency Models", 2023, algorithm 1, with fixed scales instead of an embedding of them,
and the boundary conditions of diffusers' LCMScheduler, with which the student draws. It takes k = 1000 / N timesteps
at a time, so one step of the solver is one of a sampler with N steps.

Letters: B samples, h, w latent size, c latent channels, L condition tokens, C cross-attention width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import nn

from lego_pipeline.diffusion_step import Denoiser, Inputs
from lego_pipeline.guidance import Scale, combine, is_guided, needed_passes, stack_passes
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.training import seed_of

# All layers with weights: a pass has to do what many did, and attention alone is not enough for that.
ADAPTED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
)
HUBER = 1e-3  # where the loss goes over from square to absolute, as in LCM
NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def student_scheduler(scheduler: Any, teacher_steps: int) -> LCMScheduler:
    """The scheduler that a student draws with.

    Args:
        scheduler: of the teacher's pipeline; its noise levels and prediction type are taken.
        teacher_steps: N.

    Raises:
        ValueError: N is more than there are timesteps, or an LCMScheduler can't have the teacher's noise levels.
    """
    kept = {name: scheduler.config[name] for name in NOISE if name in scheduler.config}
    count = len(scheduler.alphas_cumprod)
    if not 1 <= teacher_steps <= count:
        raise ValueError(f"`teacher_steps` must be at least 1 and at most the {count} timesteps, got {teacher_steps}.")
    try:
        made = LCMScheduler(**kept, original_inference_steps=teacher_steps)
    except NotImplementedError as error:
        raise ValueError(f"`pipeline` must have noise levels that an LCMScheduler knows, but {error}") from error
    if not torch.allclose(made.alphas_cumprod, scheduler.alphas_cumprod.float().cpu(), rtol=1e-4, atol=1e-6):
        raise ValueError(
            "`pipeline` must have noise levels that an LCMScheduler knows, got others in its "
            f"{type(scheduler).__name__}; train it with a plain beta schedule."
        )
    if kept["prediction_type"] == "epsilon" and made.alphas_cumprod[-1] < 1e-6:
        raise ValueError(
            "`pipeline` must not predict the noise where its last timestep is noise alone (`rescale_betas_zero_snr`), "
            "as that says nothing of the clean latents; train it with v_prediction or sample."
        )
    return made


class Student(nn.Module):
    """The trained UNet, as what gradients are averaged over processes for.

    Args:
        unet: with adapters.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor, image_latents: torch.Tensor
    ) -> torch.Tensor:
        """Prediction (B, c, h, w) from noisy and image latents (B, c, h, w), timesteps (B,), condition (B, L, C)."""
        return self.unet(torch.cat([noisy, image_latents], 1), timestep, condition).sample


class ConsistencyPath:
    """The grid of the teacher's solver and the formulas along it, for noise, v and clean latents as prediction.

    Args:
        scheduler: from `student_scheduler`.
        device: of the latents.
    """

    def __init__(self, scheduler: LCMScheduler, device: torch.device | str = "cpu"):
        self.scheduler = scheduler
        self.alphas = scheduler.alphas_cumprod.float().to(device)
        self.count = scheduler.config["original_inference_steps"]
        self.skip = len(self.alphas) // self.count

    def on_grid(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) timesteps of the grid: the first that is not below the given ones, or the last."""
        return ((timestep // self.skip).clamp(max=self.count - 1) + 1) * self.skip - 1

    def step_number(self, timestep: int) -> int:
        """Which of the N steps of a sampler, counted from the noise, a timestep of the grid belongs to."""
        return self.count - 1 - timestep // self.skip

    def previous(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) the next timesteps with less noise; below the grid's first one stands 0."""
        return (timestep - self.skip).clamp(min=0)

    def clean(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Clean latents that a prediction (B, c, h, w) at noisy latents means."""
        alpha = self.alphas[timestep][:, None, None, None]
        match self.scheduler.config["prediction_type"]:
            case "epsilon":
                return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
            case "v_prediction":
                return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
            case _:
                return prediction

    def solve(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Latents at the previous timestep, by one step of DDIM without noise (Song et al., 2021, equation 12)."""
        alpha, earlier = (self.alphas[t][:, None, None, None] for t in (timestep, self.previous(timestep)))
        clean = self.clean(prediction, noisy, timestep)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return earlier.sqrt() * clean + (1 - earlier).sqrt() * noise

    def consistent(self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Where the path ends, by the student: c_skip x_t + c_out x_0, which is x_t itself at timestep 0."""
        scalings_of: Any = self.scheduler.get_scalings_for_boundary_condition_discrete
        scalings = scalings_of(timestep)  # (B,) each
        skip, out = (scaling[:, None, None, None] for scaling in scalings)
        return skip * noisy + out * self.clean(prediction, noisy, timestep)


class Teacher:
    """The frozen model with its guidance, one step of the solver at a time.

    Args:
        denoiser: UNet and projector.
        path: of its solver.
        guidance_scale, image_guidance_scale: s_T and s_I that go into the student.
        guidance_interval: fractions of the N steps in which there is guidance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        path: ConsistencyPath,
        *,
        guidance_scale: float,
        image_guidance_scale: float,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ):
        self.denoiser, self.path = denoiser, path
        self.factors, self.interval = (guidance_scale, image_guidance_scale), guidance_interval

    def scales(self, timestep: torch.Tensor) -> tuple[Scale, Scale]:
        """Both scales of each sample: 1 where the interval leaves its timestep out."""
        numbers = [self.path.step_number(t) for t in timestep.tolist()]
        guided = [is_guided(number, self.path.count, self.interval) for number in numbers]
        text, image = ([factor if on else 1.0 for on in guided] for factor in self.factors)
        return text, image

    @torch.no_grad()
    def step(self, batch: dict[str, torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Latents (B, c, h, w) at the timesteps before those of a batch of `Inputs`, all of the grid."""
        noisy, timestep = batch["noisy"], batch["timestep"]
        scales = self.scales(timestep)
        plan = needed_passes(*scales)
        conditions, frames = stack_passes(plan, condition, batch["null_condition"], batch["image_latents"])
        count = len(plan)
        given = torch.cat([noisy.repeat(count, 1, 1, 1), frames], 1)
        prediction = self.denoiser.unet(given, timestep.repeat(count), conditions).sample.float()
        return self.path.solve(combine(prediction, plan, *scales), noisy, timestep)


def consistency_losses(
    student: Predict, average: Predict, teacher: Teacher, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """(B,) pseudo-Huber distances of the student from its average one step further, by a sample's cell weights.

    Args:
        student: with gradients; called last, as its weights may be those of `average`.
        average: predicts with the averaged weights.
        teacher: on the same path.
        batch: of `Inputs`, its timesteps on the grid.
    """
    path, noisy, timestep, image_latents = teacher.path, batch["noisy"], batch["timestep"], batch["image_latents"]
    with torch.no_grad():
        condition = teacher.denoiser.condition(batch)
        earlier, before = teacher.step(batch, condition), path.previous(timestep)
        aim = path.consistent(average(earlier, before, condition, image_latents).float(), earlier, before)
    found = path.consistent(student(noisy, timestep, condition, image_latents).float(), noisy, timestep)
    error = (((found - aim).square() + HUBER**2).sqrt() - HUBER).mean(1)  # (B, h, w)
    return (error * batch["weights"]).sum((1, 2)) / batch["weights"].sum((1, 2))


@torch.no_grad()
def drawing_errors(
    pipeline: LegoPipeline, denoiser: Denoiser, inputs: Inputs, loaded: dict[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """How far from the true latents a pipeline's default call ends, and how far the input is.

    Args:
        pipeline: whose UNet, scheduler, steps and scales are used.
        denoiser: whose projector makes the condition.
        inputs: of the same frozen models.
        loaded: batch of B samples of `PairDataset`.
        seed: of the noise, which a sample has for itself.

    Returns:
        `drawn` and `copied`, (B,) squared errors, weighted like the loss.
    """
    batch = inputs(loaded)
    scale, frames, weights = inputs.scaling_factor, batch["image_latents"], batch["weights"]
    generators = [torch.Generator().manual_seed(seed_of("drawing", seed, int(i))) for i in loaded["sample"]]
    height, width = (pipeline.vae_scale_factor * side for side in frames.shape[-2:])
    noise = pipeline.prepare_latents(len(frames), height, width, generators)
    drawn = pipeline.denoise(noise, denoiser.condition(batch), batch["null_condition"], frames, generator=generators)
    errors = {}
    for name, latents in (("drawn", drawn), ("copied", scale * frames)):
        error = (latents.float() - scale * batch["target"]).square().mean(1)
        errors[name] = (error * weights).sum((1, 2)) / weights.sum((1, 2))
    return errors


def kept_share(student: float, teacher: float, copied: float) -> float | None:
    """Share of the teacher's gain over copying the input that the student keeps; None where there is no gain.

    Args:
        student, teacher, copied: errors.
    """
    return (copied - student) / (copied - teacher) if copied > teacher else None
