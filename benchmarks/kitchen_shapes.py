"""Which latent grid should the kitchen have? Sharpness and training speed of the candidates, before any training.

    python benchmarks/kitchen_shapes.py --data runs/kitchen/data

For each candidate: the reconstruction PSNR of as many principal components of the frames' patches as it has latent
channels (a bound that a trained autoencoder passes by 1 to 2 dB), whole and inside the boxes of hands and active
objects on validation frames; and how many samples per second a UNet of the kitchen's widths trains on that grid.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from examples.kitchen.components import CROSS_ATTENTION_DIM, NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS, build_unet
from examples.kitchen.frames import load_frames, load_masks, psnr, read_split, to_unit
from lego_pipeline.config import parse_config

# frame size in pixels, factor, latent channels
CANDIDATES = [(128, 8, 4), (128, 8, 8), (128, 8, 12), (96, 8, 12), (128, 16, 32), (128, 16, 48)]


@dataclass(kw_only=True)
class KitchenShapesConfig:
    data: Path  # folder of the rendered kitchen, with train/ and val/
    frames: int = 400  # for the principal components, and as many to reconstruct
    batch_size: int = 16  # of the speed measurement
    repeats: int = 3


def resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Frames (N, 3, H, W) at another size."""
    return nn.functional.interpolate(frames, (size, size), mode="bicubic", antialias=True)


def linear_reconstruction(train: torch.Tensor, frames: torch.Tensor, factor: int, channels: int) -> torch.Tensor:
    """Frames (N, 3, H, W) after projection of their factor x factor patches on principal components of `train`."""
    patches = nn.functional.pixel_unshuffle(train, factor).permute(0, 2, 3, 1).flatten(0, 2)
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean)
    components = torch.linalg.eigh(covariance.double()).eigenvectors[:, -channels:].float()
    rows = nn.functional.pixel_unshuffle(frames, factor).permute(0, 2, 3, 1) - mean
    return nn.functional.pixel_shuffle((rows @ components @ components.T + mean).permute(0, 3, 1, 2), factor)


def samples_per_second(grid: int, channels: int, config: KitchenShapesConfig) -> float:
    """Best of the repeats: forward and backward of the kitchen's UNet widths on a grid."""
    unet = build_unet(grid, channels)
    condition = torch.randn(config.batch_size, 77 + NUM_IMAGE_TOKENS + NUM_TEXT_TOKENS, CROSS_ATTENTION_DIM)
    latents = torch.randn(config.batch_size, 2 * channels, grid, grid)
    best = 0.0
    for _ in range(config.repeats):
        started = time.perf_counter()
        unet(latents, 500, condition).sample.square().mean().backward()
        best = max(best, config.batch_size / (time.perf_counter() - started))
    return best


def main(config: KitchenShapesConfig) -> None:
    torch.manual_seed(0)
    train = to_unit(load_frames(read_split(config.data, "train").select(range(config.frames)))[:, 1])
    rows = read_split(config.data, "val").select(range(config.frames))
    pictures = load_frames(rows)[:, 1]
    frames, masks = to_unit(pictures), load_masks(rows, *pictures.shape[-2:])[:, 1]
    speeds = {
        candidate: samples_per_second(candidate[0] // candidate[1], candidate[2], config) for candidate in CANDIDATES
    }
    slowest = min(speeds.values())
    print(f"{torch.get_num_threads()} threads, batch {config.batch_size}; slowest {slowest:.1f} samples/s")
    print("| frame | factor | channels | grid | linear PSNR whole | in boxes | training speed |")
    print("|---|---|---|---|---|---|---|")
    for (size, factor, channels), speed in speeds.items():
        output = linear_reconstruction(resized(train, size), resized(frames, size), factor, channels)
        output = resized(output, frames.shape[-1])
        whole, inside = psnr(output, frames).mean(), psnr(output, frames, masks).mean()
        grid = f"{size // factor}x{size // factor}"
        print(f"| {size} | {factor} | {channels} | {grid} | {whole:.1f} | {inside:.1f} | {speed / slowest:.1f}x |")


if __name__ == "__main__":
    main(parse_config(KitchenShapesConfig, __doc__))
