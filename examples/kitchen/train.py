"""From nothing to the embedded checkpoint in one resumable command; `make kitchen` runs it.

    python -m examples.kitchen.train --run-dir runs/kitchen --max-minutes 60

Stages: render -> autoencoder -> small CLIP -> visual instruction tuning of a small LLaVA -> descriptions and
embeddings -> UNet and projector -> few-step adapters. Most are scripts that can be run on their own; running this
command again goes on with the first stage that is not finished. `--max-minutes` ends the slice wherever it is. The
result is `RUN_DIR/ldm/last` and `RUN_DIR/fast/lora`; with `--export` they also replace the embedded checkpoint. The
device is found by accelerate.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPVisionModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from examples.kitchen.components import (
    FRAME_SIZE,
    build_projector,
    build_scheduler,
    build_unet,
    build_vlm,
    set_copy,
)
from examples.kitchen.frames import read_split
from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FAST, KITCHEN
from lego_pipeline.config import parse_config
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.shards import pixel_key
from lego_pipeline.export import note_vlm, whole_folder
from lego_pipeline.lora import COMFYUI_FILE
from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask


@dataclass(kw_only=True)
class TrainKitchenConfig:
    run_dir: Path = Path("runs/kitchen")
    pairs: int = 9000  # rendered for training
    validation_pairs: int = 400
    test_pairs: int = 600  # in kitchens and with verb-noun combinations that training never sees
    workers: int = 2  # of rendering
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to the end
    vae_steps: int = 4300  # of 8 frames
    clip_steps: int = 900  # of 64 frames
    vlm_steps: int = 3000  # of 32 frames
    ldm_steps: int = 4700  # of 48 pairs
    fast_steps: int = 1000  # of 32 pairs
    export: bool = False  # write the result to lego_pipeline/checkpoints/kitchen
    seed: int = 0


class OutOfTime(Exception):
    """The slice's minutes are over."""


class Chain:
    """Runs stages as subprocesses until the time is over.

    Args:
        run_dir: the stages' folders are made in it.
        max_minutes: of this slice, 0 for no limit.
        seed: of every training script.
    """

    def __init__(self, run_dir: Path, max_minutes: float = 0.0, seed: int = 0):
        self.data, self.run, self.seed = run_dir / "data", run_dir, seed
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None

    def minutes_left(self) -> float:
        """Of the slice, 0 for no limit.

        Raises:
            OutOfTime: none are left.
        """
        if self.deadline is None:
            return 0.0
        left = (self.deadline - time.monotonic()) / 60
        if left < 0.1:
            raise OutOfTime
        return left

    def call(self, *arguments: str | Path) -> None:
        """Runs a Python command; its failure ends this program with its exit code.

        A command that outlasts the slice by a minute is killed: training scripts end by themselves, and rendering and
        caching lose no more than an unfinished shard.
        """
        print("$ python", *arguments, flush=True)
        minutes = self.minutes_left()
        limit = 60 * (minutes + 1) if minutes else None
        try:
            code = subprocess.run([sys.executable, *map(str, arguments)], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        if code:
            raise SystemExit(code)

    def train(self, folder: str, *arguments: str | Path) -> None:
        """Runs a training script until it is finished or the time is over."""
        report = self.run / folder / "report.json"
        while not (report.exists() and json.loads(report.read_text())["finished"]):
            limit = f"{self.minutes_left():.2f}"
            self.call(*arguments, "--output-dir", self.run / folder, "--max-minutes", limit, "--seed", str(self.seed))


def start_vlm(run: Path, data: Path) -> None:
    """LLaVA around the trained vision tower, before tuning."""
    rows = read_split(data, "train")
    questions = [ask(DEFAULT_QUESTION, action) for action in sorted(set(rows["action"][:]))]
    torch.manual_seed(0)
    tower = CLIPVisionModel.from_pretrained(run / "clip" / "vision_tower")
    vlm, processor = build_vlm([*rows["description"][:], *questions], tower)
    with whole_folder(run / "vlm_start") as folder:
        vlm.save_pretrained(folder)
        processor.save_pretrained(folder)


def frame_statistics(folder: Path, rows: Dataset) -> dict[str, Any]:
    """How the training frames' pooled image embeddings vary least, and a distance that none of them comes near.

    Frames of another kind stand out where the training frames hardly differ, so the distance is measured along the 32
    principal directions of the least variance. The limit is 1.5 times the largest distance of a training frame.

    Args:
        folder: of the embedding cache.
        rows: to train on.
    """
    cache = EmbeddingCache(folder)
    recipe = cache.recipe()
    connector = cache.connector(recipe)
    keys = sorted({recipe.frame_key(pixel_key(image)) for image in rows["image_0"]})
    pooled = torch.stack([connector(cache.frame_states(key)).mean(0) for key in keys])
    directions = torch.linalg.eigh(torch.cov(pooled.T)).eigenvectors[:, :32].T  # (K, D), least variance first
    directions = directions.mul(1e4).round() / 1e4  # as they are written
    along = pooled @ directions.T  # (N, K)
    mean, scale = along.mean(0), along.std(0).clamp_min(1e-4)
    distance = ((along - mean) / scale).square().mean(1)
    return {
        "directions": [[round(value, 4) for value in row] for row in directions.tolist()],
        "mean": [round(value, 5) for value in mean.tolist()],
        "scale": [round(value, 6) for value in scale.tolist()],
        "limit": round(1.5 * distance.max().item(), 2),
    }


def start_pipeline(run: Path, data: Path) -> None:
    """The LegoPipeline folder that training of UNet and projector starts from."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(run / "vae" / "vae")
    unet = build_unet()
    set_copy(unet, vae.config.scaling_factor)
    pipeline = LegoPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(run / "clip" / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(run / "clip" / "tokenizer"),
        unet=unet,
        scheduler=build_scheduler(),
        projector=build_projector(),
        vlm=AutoModelForImageTextToText.from_pretrained(run / "vlm" / "vlm"),
        vlm_processor=AutoProcessor.from_pretrained(run / "vlm" / "vlm"),
        question_template=DEFAULT_QUESTION,
        resolution=FRAME_SIZE,
        num_inference_steps=4,
        guidance_scale=1.5,
        image_guidance_scale=1.0,
        max_new_tokens=48,
        temperature=0.2,
        keep_scene=(0.3, 0.6),
        frame_statistics=frame_statistics(run / "cache", read_split(data, "train")),
    )
    with whole_folder(run / "start") as folder:
        pipeline.save_pretrained(folder)


def ldm_command(data: Path, start: Path, steps: int) -> tuple[str | Path, ...]:
    """Training of UNet and projector, but for where embeddings come from."""
    return (
        *("train/train_ldm.py", "--config", "train/configs/kitchen.yaml", "--data", data),
        *("--pipeline", start, "--max-steps", str(steps)),
    )


def export(run: Path, folder: Path) -> None:
    """Writes the trained pipeline with the newest decoder and its few-step adapters, all in half precision.

    An older `folder` is replaced. The adapters for ComfyUI stay in the run: they are as large again.
    """
    pipeline = LegoPipeline.from_pretrained(
        run / "ldm" / "last", vae=AutoencoderKL.from_pretrained(run / "vae" / "vae")
    )
    with whole_folder(folder) as unfinished:
        pipeline.to(torch.float16).save_pretrained(unfinished)
        note_vlm(unfinished)
        shutil.copytree(run / "fast" / "lora", unfinished / FAST, ignore=shutil.ignore_patterns(COMFYUI_FILE))


def main(config: TrainKitchenConfig) -> None:
    chain = Chain(config.run_dir, config.max_minutes, config.seed)
    data, run = chain.data, chain.run
    splits = {"train": config.pairs, "val": config.validation_pairs, "test": config.test_pairs}
    try:
        for split, pairs in splits.items():
            chain.call(
                *("-m", "examples.kitchen.render", "--pairs", str(pairs), "--size", str(FRAME_SIZE)),
                *("--split", split, "--out", data / split, "--workers", str(config.workers)),
            )
        vae = ("-m", "examples.kitchen.train_vae", "--data", data, "--max-steps", str(config.vae_steps))
        clip = ("-m", "examples.kitchen.train_clip", "--data", data, "--max-steps", str(config.clip_steps))
        chain.train("vae", *vae)
        chain.train("clip", *clip)
        if not (run / "vlm_start").exists():
            start_vlm(run, data)
        chain.train(
            "vlm",
            *("train/tune_vlm.py", "--data", data / "train", "--vlm", run / "vlm_start", "--batch-size", "32"),
            *("--learning-rate", "1e-3", "--max-steps", str(config.vlm_steps)),
        )
        chain.call(
            *("train/cache_embeddings.py", "--data", data, "--split", "train", "val", "--batch-size", "64"),
            *("--vlm", run / "vlm" / "vlm", "--cache", run / "cache", "--max-new-tokens", "48"),
        )
        if not (run / "start").exists():
            start_pipeline(run, data)
        chain.train("ldm", *ldm_command(data, run / "start", config.ldm_steps), "--cache", run / "cache")
        chain.train(
            "fast",
            *("train/distill_ldm.py", "--config", "train/configs/kitchen_fast.yaml", "--data", data),
            *("--cache", run / "cache", "--pipeline", run / "ldm" / "last", "--max-steps", str(config.fast_steps)),
        )
    except OutOfTime:
        print(f"the slice's {config.max_minutes:g} minutes are over; the same command goes on from here")
        return
    if config.export:
        export(run, KITCHEN)
        print(f"checkpoint written to {KITCHEN}")


if __name__ == "__main__":
    main(parse_config(TrainKitchenConfig, __doc__))
