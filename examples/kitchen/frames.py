"""Frames and boxes of a manifest as tensors in memory, for the kitchen's small training scripts."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from lego_pipeline.data.boxes import box_mask
from lego_pipeline.data.manifest import read_manifest


def load_frames(rows: Dataset, name: str = "read frames") -> torch.Tensor:
    """(N, 2, 3, H, W) uint8: the input and the target frame of every row."""
    frames = None
    for i, row in enumerate(tqdm(rows.select_columns(["image_0", "image_1"]), desc=name, mininterval=5)):
        for k in (0, 1):
            picture = np.asarray(row[f"image_{k}"].convert("RGB"))
            if frames is None:
                frames = np.empty((len(rows), 2, 3, *picture.shape[:2]), np.uint8)
            frames[i, k] = picture.transpose(2, 0, 1)
    return torch.from_numpy(frames)


def to_unit(frames: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return frames.float() / 127.5 - 1


def load_masks(rows: Dataset, height: int, width: int) -> torch.Tensor:
    """(N, 2, height, width) bool: the boxes of hands and active objects in the input and the target frame."""
    boxes = rows.select_columns(["boxes_0", "boxes_1"])
    return torch.stack([torch.stack([box_mask(row[f"boxes_{k}"], height, width) for k in (0, 1)]) for row in boxes])


def read_split(data: Path, split: str) -> Dataset:
    """Rows of one split of the rendered kitchen."""
    return read_manifest(data / split, split)


def psnr(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1], inside `mask` (B, H, W) if given."""
    error = (a.clamp(-1, 1) - b).square().mean(1)  # (B, H, W)
    if mask is None:
        mean = error.mean((1, 2))
    else:
        mean = (error * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
    return 10 * torch.log10(4 / mean.clamp_min(1e-10))
