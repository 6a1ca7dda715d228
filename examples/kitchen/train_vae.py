"""Train the kitchen's autoencoder: the encoder is the frames' principal components, only the decoder learns.

    python -m examples.kitchen.train_vae --data DATA --output-dir runs/vae

The encoder is exact from the start (see components.py), so latents, and a UNet on them, never have to wait for the
decoder. Loss: L1 in colour plus L1 of the differences between neighbouring pixels, 3 : 1 in hand and object boxes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.optimization import get_scheduler

from examples.kitchen.components import build_vae
from examples.kitchen.frames import load_frames, load_masks, psnr, read_split, to_unit
from lego_pipeline.config import run
from lego_pipeline.training import ResumableEma, ResumableSteps, SampleOrder, resume_settings


@dataclass(kw_only=True)
class TrainVaeConfig:
    data: Path  # folder of the rendered kitchen, with train/ and val/
    output_dir: Path = Path("runs/kitchen/vae")
    batch_size: int = 8  # frames
    max_steps: int = 6000
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to max_steps
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema_decay: float = 0.995
    box_weight: float = 3.0  # of pixels inside hand and object boxes against 1 elsewhere
    max_pairs: int = 4000  # that are held in memory
    seed: int = 0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L1 plus L1 of horizontal and vertical differences; all (B, 3, H, W), weight (B, 1, H, W)."""
    loss = ((output - target).abs() * weight).mean()
    for axis in (-1, -2):
        difference = (output - target).diff(dim=axis).abs()
        loss = loss + (difference * weight.narrow(axis, 1, weight.shape[axis] - 1)).mean()
    return loss


@torch.no_grad()
def evaluate(vae: AutoencoderKL, frames: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Reconstruction PSNR in dB of frames (N, 3, H, W) uint8, whole and inside boxes (N, H, W)."""
    whole, inside = [], []
    for picture, mask in zip(to_unit(frames).split(16), masks.split(16), strict=True):
        output = vae.decode(vae.encode(picture).latent_dist.mode()).sample
        whole.append(psnr(output, picture))
        inside.append(psnr(output, picture, mask))
    return {"psnr": torch.cat(whole).mean().item(), "psnr_boxes": torch.cat(inside).mean().item()}


def main(config: TrainVaeConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    train = read_split(config.data, "train")
    train = train.select(range(min(len(train), config.max_pairs)))
    frames = load_frames(train).flatten(0, 1)  # (2N, 3, H, W)
    masks = load_masks(train, *frames.shape[-2:]).flatten(0, 1)
    initial = config.output_dir / "initial"
    if not (initial / "config.json").exists():
        torch.manual_seed(config.seed)
        build_vae(to_unit(frames[:600])).save_pretrained(initial)
    vae = AutoencoderKL.from_pretrained(initial)
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), config.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    decoder, optimizer = accelerator.prepare(vae.decoder, optimizer)
    ema = ResumableEma(vae.decoder.parameters(), decay=config.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema, schedule)
    vae.encoder.to(accelerator.device)
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=SampleOrder([len(frames)], seed=config.seed),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings=resume_settings(config),
        max_minutes=config.max_minutes,
        seed=config.seed,
        name="VAE decoder",
    )
    for _, indices in steps:
        target = to_unit(frames[indices]).to(accelerator.device)
        weight = 1 + (config.box_weight - 1) * masks[indices, None].float().to(accelerator.device)
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mode()
        loss = reconstruction_loss(decoder(latents), target, weight / weight.mean())
        steps.update(loss, vae.decoder.parameters(), optimizer, schedule)
        ema.step(vae.decoder.parameters())
        steps.log(loss=loss.detach())
    if accelerator.is_main_process:
        ema.copy_to(vae.decoder.parameters())
        vae.to("cpu").save_pretrained(config.output_dir / "vae")
        held_out = read_split(config.data, "val")
        held_out = held_out.select(range(min(len(held_out), 100)))
        pictures = load_frames(held_out)[:, 1]
        report = evaluate(vae, pictures, load_masks(held_out, *pictures.shape[-2:])[:, 1])
        report = {"step": steps.step, "finished": steps.finished, **report}
        (config.output_dir / "report.json").write_text(json.dumps(report, indent=1))
        print(json.dumps(report))


if __name__ == "__main__":
    run(main, TrainVaeConfig, __doc__)
