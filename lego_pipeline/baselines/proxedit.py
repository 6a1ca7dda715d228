"""ProxEdit (Han et al., WACV 2024): the frame is inverted, and only where the text changes much is it drawn anew.

With the prediction e(z, c) of the model for latents z and text c, source text c_s (what the frame shows), target text
c (what it shall show), guidance scale w and DDIM's step S from one noise level to the next:

1. Inversion. From the frame's latents z*_0, DDIM backwards without guidance: z*_k = S(z*_{k-1}, e(z*_{k-1}, c_s)),
   up to z*_K.
2. Negative-prompt inversion (Miyake et al., 2023). Sampling starts from z_K = z*_K with e(z, c_s) where guidance
   usually has the empty text, so that without guidance the frame comes back.
3. Proximal guidance. ``e = e(z, c_s) + w prox(d)`` with ``d = e(z, c) - e(z, c_s)``. With the quantile q of |d| in a
   sample as threshold l, prox keeps d where |d| > l and is 0 elsewhere ("l0", hard), or is sign(d) max(|d| - l, 0)
   ("l1", soft).
4. Inversion guidance. Below a timestep, what lies outside M = {|d| > l}, dilated, is drawn to the inversion of the
   same noise level: ``z_k <- z_k - r (1 - M) (z_k - z*_k)``.

Facts of `phymhan/prompt-to-prompt: run_npi.py` (the authors' examples): w = 7.5 to 9, "l0" with q = 0.7 to 0.9, r =
0.1 to 1 below timestep 400 to 1000; and of their step as `cure-lab/PnPInversion:
models/p2p/proximal_guidance_forward.py` has it: what it calls "l0" subtracts the threshold too, as soft thresholding
does, where this is the l0 norm's operator; and its threshold is one for a whole batch, where here each sample has its
own. Their attention control (prompt-to-prompt) asks for a source text that differs from the target's in single words.
An egocentric frame with a label has none, so it is left out, and c_s is the empty text unless one is given.

Letters: B samples, c latent channels, h, w latent size, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lego_pipeline.baselines.base import StableDiffusion

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class ProxEdit(StableDiffusion):
    """Proximal guidance on negative-prompt inversion, without attention control; see the module.

    No noise is drawn, so the seed has no effect.

    Args:
        source_prompt: c_s, what all frames show.
        proximal: "l0" (hard threshold) or "l1" (soft threshold).
        quantile: q in [0, 1], of the guidance difference that is cut off; 0 keeps all, 1 keeps none.
        inversion_guidance: r in [0, 1]; 0 switches it off.
        inversion_guidance_below: timestep from which on, downwards, it acts.
        dilation: cells by which M is widened.
        num_inference_steps, guidance_scale, resolution: see `StableDiffusion`. A guidance scale of 0 reconstructs.
    """

    source_prompt: str = ""
    proximal: Literal["l0", "l1"] = "l0"
    quantile: float = 0.7
    inversion_guidance: float = 1.0
    inversion_guidance_below: int = 400
    dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("quantile", "inversion_guidance"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
        for name in ("inversion_guidance_below", "dilation"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")

    def draw_inputs(self, inputs: torch.Tensor, texts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
        source, target = (self._encode_text(given) for given in ([self.source_prompt] * len(texts), texts))
        path = self.invert(self.encode(inputs), source)
        return self.decode(self.sample(path, source, target))

    def invert(self, latents: torch.Tensor, source: torch.Tensor) -> list[torch.Tensor]:
        """z*_0 to z*_K of clean latents z*_0.

        Args:
            latents: (B, c, h, w), scaled for the UNet.
            source: (B, 77, C) text states of c_s.
        """
        from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

        scheduler = self._scheduler(DDIMInverseScheduler)
        path = [latents.to(self.pipeline.unet.dtype)]
        for timestep in scheduler.timesteps:
            prediction = self._predict(path[-1], timestep, source)
            path.append(scheduler.step(prediction, timestep, path[-1], return_dict=False)[0])
        return path

    def sample(self, path: list[torch.Tensor], source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """z_0 (B, c, h, w), from an inversion's last latents downwards.

        Args:
            path: of `invert`.
            source, target: (B, 77, C) text states of c_s and c.
        """
        import torch
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from torch.nn import functional

        scheduler = self._scheduler(DDIMScheduler)
        latents = path[-1]
        for timestep, inverted in zip(scheduler.timesteps, reversed(path[:-1]), strict=True):
            both = torch.cat([source, target])
            own, other = self._predict(torch.cat([latents] * 2), timestep, both).chunk(2)
            step, kept = proximal(other - own, self.quantile, self.proximal)
            prediction = own + self.guidance_scale * step
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if self.inversion_guidance and int(timestep) < self.inversion_guidance_below:
                width = 2 * self.dilation + 1
                mask = functional.max_pool2d(kept.to(latents.dtype), width, stride=1, padding=self.dilation)
                latents = latents - self.inversion_guidance * (1 - mask) * (latents - inverted)
        return latents

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.pipeline.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.pipeline.encode_prompt(texts, self.pipeline.device, 1, False)[0]

    def _scheduler(self, cls: Any) -> Any:
        """A scheduler of the model's noise levels; both directions have the same ones, and neither clips."""
        same = {"timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False}
        scheduler = cls.from_config(self.pipeline.scheduler.config, **same)
        scheduler.set_timesteps(self.num_inference_steps, device=self.pipeline.device)
        return scheduler


def proximal(difference: torch.Tensor, quantile: float, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """prox of a guidance difference, and where it is above the threshold.

    Args:
        difference: (B, c, h, w) d.
        quantile: of |d| in each sample, the threshold l.
        norm: "l0" or "l1".

    Returns:
        prox(d), and {|d| > l} as booleans, both (B, c, h, w).

    Source: ProxEdit; the proximal operators of the l0 and l1 norms are hard and soft thresholding.
    """
    import torch

    size = difference.float().abs()
    threshold = torch.quantile(size.flatten(1), quantile, dim=1).view(-1, 1, 1, 1)
    # Quantile 0 keeps all, and where a sample is 0 everywhere nothing is above.
    kept = size > threshold if quantile > 0 else size >= threshold
    if norm == "l1":
        shrunk = difference.sign() * (size - threshold).clamp_min(0).to(difference.dtype)
        return shrunk, kept
    return torch.where(kept, difference, torch.zeros_like(difference)), kept
