"""The sampler of the released model as a diffusers scheduler: Euler steps on k-diffusion's noise levels.

LEGO samples with k-diffusion 0.0.15, `CompVisDenoiser` and `sample_euler_ancestral`. diffusers'
`EulerAncestralDiscreteScheduler` interpolates noise levels linearly where k-diffusion interpolates their logarithms,
rounds them to float32, draws noise in the last step too (without effect, but the generator advances), and knows
neither clean-latent prediction nor steps without noise. Written from the formulas of `crowsonkb/k-diffusion:
k_diffusion/{sampling,external}.py` and, for the second convention, of ComfyUI's discrete model sampling.

Letters: B samples, n steps, t timestep in [0, num_train_timesteps - 1], sigma noise level of x = x0 + sigma * noise.
"""

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
CONVENTIONS = ("k-diffusion", "comfyui")


class LegoEulerAncestralScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral Euler sampling as the released model was sampled; without noise it is plain Euler.

    The n timesteps are evenly spaced from the last to the first one trained, and their noise levels are interpolated
    between those of whole timesteps in the logarithm. A level of 0 comes last.

    Args:
        num_train_timesteps: number of noise levels that the model was trained on.
        beta_start, beta_end: first and last beta of training.
        beta_schedule: "scaled_linear", the square roots of the betas are evenly spaced (Stable Diffusion), or
            "linear", the betas are.
        prediction_type: what the model predicts: "epsilon" the noise, "v_prediction" the velocity, "sample" the clean
            latent.
        eta: share of ancestral noise, 1 as released; 0 gives deterministic Euler steps.
        conventions: "k-diffusion" gives the model fractional timesteps and starts from noise times the largest sigma,
            as released. "comfyui" gives it the whole timestep whose noise level is nearest and starts from noise times
            sqrt(1 + sigma^2), so that a ComfyUI graph (scheduler "normal", sampler "euler" for eta 0,
            "euler_ancestral" for eta 1) and a script give the same picture for the same noise.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, algorithm 2
    without churn; ancestral step as in k-diffusion.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        eta: float | int = 1.0,
        conventions: str = "k-diffusion",
    ):
        for name, value, known in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("conventions", conventions, CONVENTIONS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}; pass one.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, got {eta}; 1 is ancestral, 0 draws no noise.")
        power = 2 if beta_schedule == "scaled_linear" else 1
        ends = beta_start ** (1 / power), beta_end ** (1 / power)
        betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** power
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.betas, self.alphas_cumprod = betas.float(), alphas_cumprod.float()
        if conventions == "k-diffusion":  # reads the products from the checkpoint, which stores them in float32
            alphas_cumprod = self.alphas_cumprod.double()
        self._log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2  # (num_train_timesteps,) float64
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        highest = float(self._log_sigmas[-1].exp())
        return math.sqrt(1 + highest**2) if self.config["conventions"] == "comfyui" else highest

    @property
    def step_index(self) -> int | None:
        """Index of the next step, None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step where a pipeline starts in the middle, else None."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts in the middle of the steps, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays out the steps of a run.

        Sets `timesteps` (n,) float32 on `device`, falling, and `sigmas` (n + 1,) float64 on the CPU, the last one 0.

        Args:
            num_inference_steps: n, at most the number of timesteps trained.
            device: of the timesteps.

        Raises:
            ValueError: n is out of range.
        """
        highest = self.config["num_train_timesteps"] - 1
        if not 1 <= num_inference_steps <= highest + 1:
            raise ValueError(
                f"`num_inference_steps` must be between 1 and {highest + 1}, got {num_inference_steps}; "
                "more steps than noise levels give nothing."
            )
        if self.config["conventions"] == "comfyui":
            timesteps, sigmas = self._comfyui_steps(num_inference_steps)
        else:
            timesteps = torch.linspace(highest, 0, num_inference_steps, dtype=torch.float64)
            sigmas = _interpolate(self._log_sigmas, timesteps).exp()
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = timesteps.to(device, torch.float32)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """Noisy latents (B, c, h, w) brought to about unit variance, as the model was trained on them."""
        return sample / (self._sigma_of(timestep) ** 2 + 1) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from the noise level of `timestep` to the next lower one.

        Args:
            model_output: (B, c, h, w) float, prediction of the kind `prediction_type`.
            timestep: one of `timesteps`.
            sample: (B, c, h, w) float, latents at this noise level, not scaled.
            generator: of the step's noise, one or B. Drawn from only where noise is added: never in the last step.
            return_dict: False returns the two tensors as a tuple.

        Returns:
            `prev_sample` and `pred_original_sample` (the predicted clean latents), both (B, c, h, w).
        """
        sigma = float(self._sigma_of(timestep))
        index = self._step_index or 0
        sigma_next = float(self.sigmas[index + 1])
        dtype, sample, output = model_output.dtype, sample.float(), model_output.float()

        match self.config["prediction_type"]:
            case "epsilon":
                denoised = sample - sigma * output
            case "v_prediction":
                denoised = sample / (sigma**2 + 1) - output * (sigma / (sigma**2 + 1) ** 0.5)
            case _:
                denoised = output
        down, up = _ancestral_levels(sigma, sigma_next, self.config["eta"])
        previous = sample + (sample - denoised) / sigma * (down - sigma)
        if up > 0:
            noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
            previous = previous + up * noise.float()
        self._step_index = index + 1
        if not return_dict:
            return previous.to(dtype), denoised.to(dtype)
        return EulerAncestralDiscreteSchedulerOutput(
            prev_sample=previous.to(dtype), pred_original_sample=denoised.to(dtype)
        )

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, c, h, w) with noise of the levels of B timesteps, each one of `timesteps`."""
        if self._begin_index is None:
            indices = [self._index_of(t) for t in timesteps]
        else:  # a pipeline that starts in the middle, or paints into a picture while it runs
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        sigmas = self.sigmas[indices].to(original_samples.device, original_samples.dtype)
        return original_samples + noise * sigmas.view(-1, *[1] * (original_samples.ndim - 1))

    def _sigma_of(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """Noise level of the running step; the first call of a run finds it by its timestep."""
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        return self.sigmas[self._step_index]

    def _index_of(self, timestep: Any) -> int:
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if not len(found):
            raise ValueError(
                f"`timestep` must be one of the scheduler's `timesteps`, got {float(timestep):g}; "
                "call `set_timesteps` first and pass its elements."
            )
        return int(found[0])

    def _comfyui_steps(self, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps and noise levels (n,) with ComfyUI's roundings.

        All in float32: half way between two timesteps it is rounding that decides which of them is nearest.
        """
        table = self._log_sigmas.float()
        sigmas = _interpolate(table, torch.linspace(len(table) - 1, 0, num_inference_steps)).exp()
        timesteps = (sigmas.log()[:, None] - table).abs().argmin(dim=1)
        return timesteps, sigmas.double()


def _interpolate(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values of a table at fractional places, linear between neighbours."""
    low = places.floor().long()
    share = places.frac()
    return (1 - share) * table[low] + share * table[places.ceil().long()]


def _ancestral_levels(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Noise level to go down to and level of the fresh noise; their squares sum to sigma_next squared."""
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up
