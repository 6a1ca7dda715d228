"""One training step of LEGO's latent diffusion model: frozen models, denoiser and loss.

    Inputs     loaded batch of `lego_pipeline.data.pairs`  -> noisy latents, conditions and target
    Denoiser   these                                       -> prediction (UNet and projector, which are trained)
    losses_of  both                                        -> one loss per sample

Facts of the released code: `BolinLai/LEGO: stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`; unlike there the
projector is part of what is trained. Letters: B samples, h, w latent size, c latent channels, T timesteps, N_i VLM
image tokens, N_t text states, D VLM width.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from lego_pipeline.conditioning import drop_conditions
from lego_pipeline.enhance import enhance
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.training import seed_of
from lego_pipeline.vlm import Enhancement

IMAGE, TEXT = ("image_embeds", ("image_projection",)), ("text_embeds", ("text_projection", "text_mixer"))
VLM_PARTS = {"both": (IMAGE, TEXT), "image": (IMAGE,), "text": (TEXT,), "none": ()}  # what is used: tensor, modules
SAMPLING = ("question_template", "max_new_tokens", "temperature", "top_k")  # in a pipeline's config and in a recipe


class Denoiser(nn.Module):
    """What is trained: UNet and projector as one module, for gradient averaging over processes and for the average.

    Args:
        unet, projector: of the pipeline.
        dropout: share of samples that lose the text condition, both conditions, or the image condition, each.
        vlm_parts: key of VLM_PARTS; the other part is zeros, for ablations, and its projection is not trained.
    """

    def __init__(self, unet: nn.Module, projector: nn.Module, dropout: float, vlm_parts: str = "both"):
        super().__init__()
        self.unet, self.projector, self.dropout = unet, projector, dropout
        used = VLM_PARTS[vlm_parts]
        self.embeds = [name for name, _ in used]
        for part in VLM_PARTS["both"]:
            for name in part[1] if part not in used else ():
                projector.get_submodule(name).requires_grad_(False)  # weights without a gradient stop DDP

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prediction (B, c, h, w) from what `Inputs` gives."""
        condition, image_latents = drop_conditions(
            self.condition(batch), batch["null_condition"], batch["image_latents"], batch["drop"], self.dropout
        )
        return self.unet(torch.cat([batch["noisy"], image_latents], 1), batch["timestep"], condition).sample

    def condition(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Condition (B, L, C) before any dropout; without the VLM's parts where a sample has none."""
        prompt = batch["prompt_embeds"]
        condition = self.projector(prompt, **{name: batch[name] for name in self.embeds if name in batch})
        vlm_part = torch.arange(condition.shape[1], device=condition.device) >= prompt.shape[1]
        return condition.masked_fill(batch["no_vlm"][:, None, None] & vlm_part[None, :, None], 0)


class Inputs:
    """What the frozen models make of a loaded batch: everything that the denoiser takes, and its target.

    Args:
        pipeline: with VAE, text encoder and projector on the device.
        vlm: model and processor that run in the step, or None.
        connector: the VLM's projector, for states from a cache, or None.
        noise_offset: share of noise that is constant over each channel, added to the other.
        seed: of descriptions that are generated in the step.
    """

    def __init__(
        self,
        pipeline: LegoPipeline,
        *,
        vlm: tuple[Any, Any] | None = None,
        connector: nn.Module | None = None,
        noise_offset: float = 0.0,
        seed: int = 0,
    ):
        self.pipeline, self.vlm, self.connector = pipeline, vlm, connector
        self.noise_offset, self.seed = noise_offset, seed
        self.device = pipeline.vae.device
        self.alphas = pipeline.scheduler.alphas_cumprod.float().to(self.device)
        self.scaling_factor = pipeline.vae.config.scaling_factor
        self.prediction_type = pipeline.scheduler.config.prediction_type
        with torch.no_grad():
            self.null_condition = pipeline.encode_null_condition()

    @torch.no_grad()
    def __call__(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """Tensors of a batch, from what `PairDataset` gives."""
        batch = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in loaded.items()}
        if "pixels" in batch:
            before, after = (self._encode(frames) for frames in batch["pixels"].unbind(1))
            batch |= {"image_latents": before.mode(), "target": after.mode(), "target_std": after.std}
        if "frame" in batch:
            batch |= self._embeds(self.enhance(batch), batch)
        if self.connector is not None:
            batch["image_embeds"] = self.connector(batch["image_states"])
        if "prompt" in batch:
            batch["prompt_embeds"] = self.pipeline.encode_prompt(batch["prompt"])
        clean = (batch["target"] + batch["target_std"] * batch["posterior_noise"]) * self.scaling_factor
        noise = batch["noise"] + self.noise_offset * batch["offset"]
        alpha = self.alphas[batch["timestep"]][:, None, None, None]
        batch["noisy"] = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        batch["goal"] = diffusion_target(self.prediction_type, clean, noise, alpha)
        batch["null_condition"] = self.null_condition
        return batch

    def _encode(self, frames: torch.Tensor) -> DiagonalGaussianDistribution:
        """Posterior of frames (B, 3, H, W). Channels-last and not both frames at once: half the time on a CPU."""
        return self.pipeline.vae.encode(frames.contiguous(memory_format=torch.channels_last)).latent_dist

    def enhance(self, batch: dict[str, Any]) -> list[Enhancement]:
        """The VLM on a batch's frames: the manifest's descriptions embedded, and generated where there are none."""
        if self.vlm is None:
            raise ValueError("`vlm` must be given where frames are loaded without their embeddings, got none.")
        vlm, processor = self.vlm
        enhancements: list[Any] = [None] * len(batch["frame"])
        for is_given in (True, False):
            numbers = [i for i, text in enumerate(batch["description"]) if (text is not None) == is_given]
            if not numbers:
                continue
            frames, actions, texts = ([batch[key][i] for i in numbers] for key in ("frame", "action", "description"))
            seeds = [seed_of("description", self.seed, int(batch["sample"][i])) for i in numbers]
            settings = {name: self.pipeline.config[name] for name in SAMPLING}
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            found = enhance(
                vlm, processor, frames, actions, texts if is_given else None, **settings, generators=generators
            )
            for i, enhancement in zip(numbers, found, strict=True):
                enhancements[i] = enhancement.to(self.device, torch.float32)
        return enhancements

    def _embeds(self, enhancements: list[Enhancement], batch: dict[str, Any]) -> dict[str, Any]:
        labels = zip(enhancements, batch["action"], batch["use_label"].tolist(), strict=True)
        return {
            "prompt": [label if use_label else enhancement.description for enhancement, label, use_label in labels],
            "image_embeds": torch.stack([enhancement.image_embeds for enhancement in enhancements]),
            "text_embeds": [enhancement.text_embeds for enhancement in enhancements],
        }


def diffusion_target(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict, for x_t = sqrt(alpha) clean + sqrt(1 - alpha) noise; alpha (B, 1, 1, 1)."""
    targets = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
        "sample": clean,
    }
    if prediction_type not in targets:
        raise ValueError(f"`prediction_type` must be one of {', '.join(targets)}, got {prediction_type!r}.")
    return targets[prediction_type]


def timestep_weights(prediction_type: str, alphas: torch.Tensor, gamma: float) -> torch.Tensor:
    """(T,) weights of the loss; with gamma those of min-SNR (Hang et al., ICCV 2023, section 3.4), otherwise 1.

    In clean latents the weight is min(SNR, gamma); an error of eps counts 1/SNR of that, one of v 1/(SNR + 1).
    """
    if gamma == 0:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisors[prediction_type]


def losses_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """(B,) squared errors, each the weighted mean over a sample's latent cells."""
    error = (model(batch).float() - batch["goal"]).square().mean(1)  # (B, h, w)
    return (error * batch["weights"]).sum((1, 2)) / batch["weights"].sum((1, 2))
