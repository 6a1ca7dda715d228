"""Is train/train_ldm.py as fast as the steps of diffusers' InstructPix2Pix example, and what does computing once gain?

    python benchmarks/training.py

The script's own `main` runs, and after each of its steps one step of the example, in turn (A B A B ...), timed apart:

1. On the fly: both load the frames, encode them and the text in every step; `--embeddings none --no-precompute`.
2. Computed once: latents and text encodings from disk, and the VLM's embeddings from a cache, with the projector
   trained too, which the example does not have at all.

The example's steps are written here from its description (`huggingface/diffusers:
examples/instruct_pix2pix/train_instruct_pix2pix.py`): target frame encoded and sampled, input frame encoded to its
mode, text and the empty text encoded, condition dropout, noise, UNet, mean squared error read back, gradient norm
clipped, AdamW, learning rate, averaged weights, progress bar. Its data come from a DataLoader as there: frames and
token ids made by a transform of the data set.

What is the same for both: the checkpoint's VAE, text tower and noise schedule, and a UNet each with the same weights
to begin with; frames and batch size; precision; optimiser; number of condition tokens (the example's text states are
filled up with zeros to the projector's length, which is what LEGO's UNet reads without a VLM); no loader processes.

Ratios are medians of the rounds of one run on one machine. Where other programs take part of the machine, look at
processor time (of all threads) before the wall clock. The share of time in which it waits for data is what the script
itself measures.
"""

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.config import parse_config, plain_values
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.enhance import fill_cache, make_recipe
from lego_pipeline.training import ResumableSteps
from train import train_ldm

SMALLEST_RATIOS = {"on the fly": 1.0, "computed once": 1.3}
LARGEST_WAIT = 0.05
CONDITION_DROPOUT = 0.05
LEARNING_RATE = 1e-4
WARM_UP = 2  # rounds that are not counted


@dataclass(kw_only=True)
class TrainingConfig:
    model: Path = KITCHEN  # LegoPipeline folder with a VLM
    data: Path = FRAMES  # manifest
    split: str = "test"
    batch_size: int = 16
    rounds: int = 10  # steps of each system that are counted
    mixed_precision: str = "no"  # no, fp16 or bf16
    threads: int = 0  # of torch on the CPU; 0 = torch's own choice
    json: Path | None = None  # also write everything measured to this file

    def __post_init__(self):
        for name, smallest in {"batch_size": 1, "rounds": 1, "threads": 0}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}.")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"`mixed_precision` must be no, fp16 or bf16, got {self.mixed_precision!r}.")


class Example:
    """The steps of diffusers' InstructPix2Pix training example.

    Args:
        pipe: whose components are trained and used; its UNet is copied.
        rows: of a manifest with `image_0`, `image_1`, `action`.
        config: batch size and precision.
    """

    def __init__(self, pipe: LegoPipeline, rows: Dataset, config: TrainingConfig):
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        self.dtype, self.size, self.tokenizer = dtype, config.batch_size, pipe.tokenizer
        self.side = pipe.config.resolution
        device = self.accelerator.device
        self.vae = copy.deepcopy(pipe.vae).requires_grad_(False).to(device, dtype)
        self.text_encoder = copy.deepcopy(pipe.text_encoder).requires_grad_(False).to(device, dtype)
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        sizes = pipe.projector.config
        self.vlm_tokens = sizes["num_image_tokens"] + sizes["num_text_tokens"]
        unet = copy.deepcopy(pipe.unet).requires_grad_(True).train()
        is_fused = device.type == "cuda"
        optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, weight_decay=1e-2, fused=is_fused)
        rate = get_scheduler("constant", optimizer)
        rows = rows.select_columns(["image_0", "image_1", "action"])
        loader = DataLoader(
            rows.with_transform(self._transform),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=self._collate,
        )
        self.average = EMAModel(unet.parameters())
        self.average.to(device)
        self.unet, self.optimizer, self.loader, self.rate = self.accelerator.prepare(unet, optimizer, loader, rate)
        self.bar = tqdm(desc="example", mininterval=5)
        self.batches = self._epochs()

    def _tokenize(self, texts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids

    def _transform(self, examples: dict[str, list[Any]]) -> dict[str, Any]:
        """Frames in [-1, 1] and token ids, in place of pictures and texts."""
        pixels = []
        for name in ("image_0", "image_1"):
            resized = [np.array(image.convert("RGB").resize((self.side, self.side))) for image in examples[name]]
            pixels.append(2 * (torch.tensor(np.stack(resized)).permute(0, 3, 1, 2) / 255) - 1)
        return {"before": pixels[0], "after": pixels[1], "ids": self._tokenize(list(examples["action"]))}

    @staticmethod
    def _collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([example[name] for example in examples]).contiguous() for name in examples[0]}

    def _epochs(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """One optimiser step on the next batch."""
        batch = next(self.batches)
        device = self.accelerator.device
        with self.accelerator.accumulate(self.unet):
            with torch.no_grad():
                latents = self.vae.encode(batch["after"].to(self.dtype)).latent_dist.sample()
                latents = latents * self.vae.config["scaling_factor"]
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, self.schedule.config["num_train_timesteps"], (self.size,), device=device)
                noisy = self.schedule.add_noise(latents, noise, timesteps)
                states = self.text_encoder(batch["ids"])[0]
                image_latents = self.vae.encode(batch["before"].to(self.dtype)).latent_dist.mode()
                draws = torch.rand(self.size, device=device)
                null_states = self.text_encoder(self._tokenize([""]).to(device))[0]
                loses_text = draws < 2 * CONDITION_DROPOUT
                states = torch.where(loses_text[:, None, None], null_states, states)
                states = functional.pad(states, (0, 0, 0, self.vlm_tokens))
                loses_image = (draws >= CONDITION_DROPOUT) & (draws < 3 * CONDITION_DROPOUT)
                image_latents = image_latents * ~loses_image[:, None, None, None]
            prediction = self.unet(torch.cat([noisy, image_latents], 1), timesteps, states).sample
            loss = functional.mse_loss(prediction.float(), self._target(latents, noise, timesteps).float())
            mean = self.accelerator.gather(loss.repeat(self.size)).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        self.bar.update()
        self.bar.set_postfix(loss=mean, step_loss=loss.detach().item(), rate=self.rate.get_last_lr()[0])

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        kind = self.schedule.config["prediction_type"]
        if kind == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return latents if kind == "sample" else noise


@dataclass
class Times:
    """Seconds of each round.

    Attributes:
        wall: to the end of what was started on a GPU.
        processor: what all threads of this process computed; on a GPU it says nothing.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, since: tuple[float, float]) -> None:
        """Notes the seconds since `clocks()` gave what is passed."""
        wall, processor = clocks()
        self.wall.append(wall - since[0])
        self.processor.append(processor - since[1])


def clocks() -> tuple[float, float]:
    """Seconds by the wall clock and of the processor, now that all that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


@contextmanager
def steps_in_turn(other: Callable[[], None]) -> Generator[tuple[Times, Times]]:
    """Within the block, `train_ldm.main` runs `other` after each of its steps; gives the seconds of both.

    A step of the script is all that it does from asking for the step to asking for the next one.
    """
    own, theirs = Times(), Times()

    class InTurn(ResumableSteps):
        def __iter__(self) -> Iterator[tuple[int, list[int]]]:
            self.restore()
            steps = super().__iter__()
            while True:
                start = clocks()
                item = next(steps, None)
                if item is None:
                    return
                yield item
                own.add(start)
                start = clocks()
                other()
                theirs.add(start)

    original = train_ldm.ResumableSteps
    train_ldm.ResumableSteps = InTurn  # ty: ignore[invalid-assignment]
    try:
        yield own, theirs
    finally:
        train_ldm.ResumableSteps = original


def fill(cache: Path, pipe: LegoPipeline, rows: Dataset) -> None:
    """The VLM's embeddings of all pairs and their own descriptions."""
    recipe = make_recipe(
        pipe.vlm, pipe.vlm_processor, question_template=pipe.config.question_template, descriptions="manifest"
    )
    store = EmbeddingCache(cache)
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        fill_cache(pipe.vlm, pipe.vlm_processor, store, recipe, part["image_0"], part["action"], part["description"])
    store.write()


def measure(way: str, config: TrainingConfig, pipe: LegoPipeline, rows: Dataset, folder: Path) -> dict[str, Any]:
    """One of `SMALLEST_RATIOS`: seconds of a step of both, their ratio, and the share of time waited for data."""
    cache = folder / "cache"
    options: dict[str, Any] = {"embeddings": "none", "precompute": False}
    if way == "computed once":
        fill(cache, pipe, rows)
        options = {"embeddings": "cache", "cache": cache}
    steps = WARM_UP + config.rounds
    settings = train_ldm.TrainLdmConfig(
        data=(config.data,),
        pipeline=config.model,
        output_dir=folder / way.replace(" ", "_"),
        split=config.split,
        validation_split=None,
        batch_size=config.batch_size,
        max_steps=steps,
        log_every_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        condition_dropout=CONDITION_DROPOUT,
        mixed_precision=config.mixed_precision,
        report_to="none",
        **options,
    )
    example = Example(pipe, rows, config)
    with steps_in_turn(example.step) as times:
        train_ldm.main(settings)
    example.bar.close()
    log = [json.loads(line) for line in (settings.output_dir / "log.jsonl").read_text().splitlines()]
    own, theirs = (Times(t.wall[WARM_UP:], t.processor[WARM_UP:]) for t in times)
    return {
        "way": way,
        "samples_per_second": {
            "example": config.batch_size / statistics.median(theirs.wall),
            "train_ldm": config.batch_size / statistics.median(own.wall),
        },
        "ratio": {clock: ratios(getattr(theirs, clock), getattr(own, clock)) for clock in ("wall", "processor")},
        "waiting_for_data": statistics.mean(line["waiting_for_data"] for line in log[WARM_UP:]),
    }


def ratios(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Median and range of the ratios of two measurements that were taken in the same rounds."""
    paired = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": statistics.median(paired), "low": min(paired), "high": max(paired)}


def bars(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured, the bar, and whether it is held."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        ratio, smallest = result["ratio"]["wall"]["median"], SMALLEST_RATIOS[result["way"]]
        by_processor = result["ratio"]["processor"]["median"]
        found[f"speed, {result['way']}"] = {"measured": ratio, "by_processor_time": by_processor, "at_least": smallest}
        found[f"waiting for data, {result['way']}"] = {"measured": result["waiting_for_data"], "at_most": LARGEST_WAIT}
    for bar in found.values():
        bar["held"] = bar.get("at_least", 0) <= bar["measured"] <= bar.get("at_most", float("inf"))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table and a line for each bar."""
    config = report["config"]
    lines = [
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, diffusers {report['diffusers']}, "
        f"mixed precision {config['mixed_precision']}, batch {config['batch_size']}, median (range) of "
        f"{config['rounds']} rounds",
        "",
        "| LEGO's inputs | the example | train_ldm.py | speed | processor time | waiting for data |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        theirs, own = result["samples_per_second"].values()
        columns = [
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in result["ratio"].values()
        ]
        lines.append(
            f"| {result['way']} | {theirs:.2f} samples/s | {own:.2f} samples/s | {' | '.join(columns)} "
            f"| {result['waiting_for_data']:.1%} |"
        )
    lines.append("")
    for name, bar in report["bars"].items():
        limit = f"at most {bar['at_most']:g}" if "at_most" in bar else f"at least {bar['at_least']:g}"
        lines.append(f"- {name} {bar['measured']:.3g}, {limit}: {'held' if bar['held'] else 'MISSED'}")
    return "\n".join(lines)


def main(config: TrainingConfig) -> dict[str, Any]:
    """Measures, prints the table, writes `config.json`; returns what it wrote."""
    threads_before = torch.get_num_threads()
    threads = config.threads or threads_before
    torch.set_num_threads(threads)
    try:
        pipe = LegoPipeline.from_pretrained(config.model)
        rows = read_manifest(config.data, config.split)
        with tempfile.TemporaryDirectory() as folder:
            results = [measure(way, config, pipe, rows, Path(folder)) for way in SMALLEST_RATIOS]
    finally:
        torch.set_num_threads(threads_before)
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "config": plain_values(config),
        "results": results,
        "bars": bars(results),
    }
    print(markdown(report))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def cpu_name() -> str:
    """Name of the processor, as Linux has it, or of its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main(parse_config(TrainingConfig, __doc__))
