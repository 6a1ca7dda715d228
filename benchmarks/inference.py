"""Is LegoPipeline as fast and small as diffusers' InstructPix2Pix pipeline, and what do its exact savings gain?

    python benchmarks/inference.py --sd15

1. One request to both pipelines, in turn (A B A B ...): largest difference of the images, ratio of the times, ratio of
   the peak memories.
2. The denoising loop with passes left out, with guidance in half of the steps, and with or without the reuse of keys
   and values: measured ratio beside the ratio of the arithmetic.
3. What guidance in half of the steps does to the picture: PSNR against the true action frames of the embedded pairs.

What is the same for both pipelines: the objects of UNet, VAE, text tower and projector; condition and null condition
as `prompt_embeds` and `negative_prompt_embeds`; the noise as `latents`; a scheduler of the same settings (a copy each,
as it carries state); steps and scales; one frame that already has the model's size, so that neither resizes, as a
tensor (of a PIL image diffusers makes one that is channels-last in memory, for which convolutions round differently);
`output_type="np"`, no progress bar, no safety checker. Both encode the frame, denoise and decode. The VLM is left out,
diffusers' pipeline has none.

Memory on the CPU is the largest resident set during the call, in a process of its own for each pipeline that imports
and holds the same; on CUDA it is what torch allocated. All ratios of a table come from one run on one machine; times
of different runs are not comparable. Where other programs take part of the machine, look at the ratio of processor
time (of all threads) before the one of the wall clock.
"""

import copy
import gc
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.kitchen.frames import load_frames, load_masks, psnr, to_unit
from lego_pipeline import LegoPipeline, images
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.config import parse_config
from lego_pipeline.data.manifest import read_manifest

LARGEST_DIFFERENCE = 1e-5  # of images in [0, 1], float32
SMALLEST_SPEED_RATIO = 1.0
LARGEST_MEMORY_RATIO = 1.05
SCALES = (7.5, 1.5)  # s_T and s_I of the paper
FEWEST_STEPS = 10  # from which on the table doesn't remark on the number of steps
SYSTEMS = ("InstructPix2Pix", "LEGO")
SD15 = "SD1.5 shape, random weights"
SD15_RESOLUTION, SD15_TOKENS, SD15_WIDTH = 256, 410, 768  # pixels; condition tokens and width as released


@dataclass(kw_only=True)
class InferenceConfig:
    model: Path = KITCHEN  # LegoPipeline folder
    sd15: bool = False  # also a UNet and VAE of SD1.5's shape with random weights, 256 px; about 6 GiB of memory
    steps: int = 10  # of the given checkpoint
    sd15_steps: int = 2
    repeats: int = 5  # of every measurement; the median and the range are printed
    quality_pairs: int = 8  # embedded pairs for the effect of the guidance interval; 0 leaves it out
    threads: int = 0  # of torch on the CPU; 0 = torch's own choice
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda
    json: Path | None = None  # also write everything measured to this file

    def __post_init__(self):
        for name, smallest in {"steps": 1, "sd15_steps": 1, "repeats": 1, "quality_pairs": 0, "threads": 0}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"`device` must be auto, cpu or cuda, got {self.device!r}.")


# --- What both pipelines are given -----------------------------------------------------------------------------------


@dataclass
class Request:
    """A pipeline and one request for it.

    Attributes:
        name: of the UNet, for the tables.
        pipe: a LegoPipeline whose components both pipelines use.
        frame: (1, 3, H, W) float32 in [0, 1], of the size at which the model works.
        condition, null_condition: (1, L, C) float32.
        noise: (1, c, h, w) float32 of variance 1.
    """

    name: str
    pipe: LegoPipeline
    frame: torch.Tensor
    condition: torch.Tensor
    null_condition: torch.Tensor
    noise: torch.Tensor


@torch.no_grad()
def make_request(pipe: LegoPipeline, frame: PIL.Image.Image, description: str, name: str = "checkpoint") -> Request:
    """Request with a description as the condition (the VLM's parts are zeros) and noise of seed 0."""
    side = pipe.config.resolution
    condition, null_condition = pipe.encode_condition(description=[description])
    noise = pipe.prepare_latents(1, side, side, torch.Generator().manual_seed(0))
    return Request(name, pipe, to_tensor(frame, side), condition, null_condition, noise)


def to_tensor(frame: PIL.Image.Image, side: int) -> torch.Tensor:
    """Frame resized to a square, (1, 3, side, side) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(frame.convert("RGB").resize((side, side))))  # (side, side, 3)
    return pixels.permute(2, 0, 1)[None].contiguous().float() / 255


def checkpoint_request(model: Path, device: str) -> Request:
    """The first embedded pair's frame and description for a checkpoint, loaded without its VLM."""
    pipe = LegoPipeline.from_pretrained(model, vlm=None, vlm_processor=None).to(device)
    pipe.register_to_config(keep_scene=False)  # as diffusers' pipeline, which decodes everything
    pipe.set_progress_bar_config(disable=True)
    row = read_manifest(FRAMES)[0]
    return make_request(pipe, row["image_0"], row["description"], model.name)


def sd15_request(model: Path, device: str) -> Request:
    """The same with UNet and VAE of Stable Diffusion 1.5's shape, random weights, and a random condition."""
    small = checkpoint_request(model, "cpu")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    # diffusers' defaults are the shape of SD 1.5; four more channels for the frame's latents.
    unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=SD15_WIDTH)
    scheduler = type(small.pipe.scheduler).from_config(small.pipe.scheduler.config, prediction_type="epsilon")
    parts = {**small.pipe.components, "vae": vae.eval(), "unet": unet.eval(), "scheduler": scheduler}
    pipe = LegoPipeline(**parts, resolution=SD15_RESOLUTION).to(device)
    pipe.set_progress_bar_config(disable=True)
    return Request(
        name=SD15,
        pipe=pipe,
        frame=images.resize(small.frame, SD15_RESOLUTION, SD15_RESOLUTION),
        condition=torch.randn(1, SD15_TOKENS, SD15_WIDTH).to(device),
        null_condition=torch.randn(1, SD15_TOKENS, SD15_WIDTH).to(device),
        noise=pipe.prepare_latents(1, SD15_RESOLUTION, SD15_RESOLUTION, torch.Generator().manual_seed(0)),
    )


REQUESTS = {"checkpoint": checkpoint_request, "sd15": sd15_request}


def make_call(system: str, request: Request, steps: int, scales: tuple[float, float]) -> Callable[[], np.ndarray]:
    """A function that runs a request through one of `SYSTEMS` and gives the images (1, H, W, 3) in [0, 1]."""
    arguments: dict[str, Any] = {
        "image": request.frame,
        "prompt_embeds": request.condition,
        "negative_prompt_embeds": request.null_condition,
        "latents": request.noise,
        "num_inference_steps": steps,
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
        "output_type": "np",
    }
    if system == "LEGO":
        return lambda: request.pipe(**arguments).images
    names = ("vae", "text_encoder", "tokenizer", "unet")
    pipe = StableDiffusionInstructPix2PixPipeline(
        **{name: getattr(request.pipe, name) for name in names},
        scheduler=copy.deepcopy(request.pipe.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(**arguments).images


# --- Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one call in each round.

    Attributes:
        wall: what a user waits, to the end of what the call started on a GPU.
        processor: what all threads of this process computed. Other processes on the machine hardly disturb it; on a
            GPU it says nothing.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], Any]) -> None:
        """Runs a call and notes its seconds."""
        _wait_for_gpu()
        wall, processor = time.perf_counter(), time.process_time()
        call()
        _wait_for_gpu()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Seconds of every call, `repeats` times, one after the other in each round; each has run once before."""
    for call in calls.values():
        call()
    times = {name: Times() for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].add(call)
    return times


def speed(slower: Times, faster: Times) -> dict[str, dict[str, float]]:
    """How many times as fast `faster` is, by the wall clock and by processor time."""
    return {"wall": ratios(slower.wall, faster.wall), "processor": ratios(slower.processor, faster.processor)}


def ratios(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Median and range of the ratios of two measurements that were taken in the same rounds."""
    paired = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": statistics.median(paired), "low": min(paired), "high": max(paired)}


def compare(request: Request, steps: int, repeats: int, scales: tuple[float, float] = SCALES) -> dict[str, Any]:
    """The same request to both pipelines: largest difference of the images, seconds, and speed of LEGO's."""
    calls = {system: make_call(system, request, steps, scales) for system in SYSTEMS}
    theirs, ours = (call() for call in calls.values())
    times = in_turn(calls, repeats)
    return {
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
        "max_difference": float(np.abs(theirs - ours).max()),
        "image_deviation": float(ours.std()),
        "seconds": {system: statistics.median(values.wall) for system, values in times.items()},
        "speed_ratio": speed(*times.values()),
    }


def peak_memory(kind: str, model: Path, system: str, steps: int, threads: int, device: str) -> dict[str, float]:
    """MiB in use before a call and at most during it. Meant for a process of its own, see `compare_memory`."""
    torch.set_num_threads(threads)
    call = make_call(system, REQUESTS[kind](model, device), steps, SCALES)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = _reset_resident_peak()
        call()
        peak = _resident_peak()
    return {"before": before / 2**20, "peak": peak / 2**20}


def compare_memory(kind: str, model: Path, steps: int, threads: int, device: str) -> dict[str, Any]:
    """Peak memory of both pipelines, each in a fresh process, one after the other."""
    measured = {}
    for system in SYSTEMS:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            measured[system] = pool.submit(peak_memory, kind, model, system, steps, threads, device).result()
    theirs, ours = measured.values()
    return {
        "mebibytes": measured,
        "ratio": ours["peak"] / theirs["peak"],
        "ratio_of_growth": (ours["peak"] - ours["before"]) / (theirs["peak"] - theirs["before"]),
    }


def _reset_resident_peak() -> int:
    """Forgets the largest resident set so far where the system can (Linux). Returns the bytes resident now."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return _resident_peak()


def _resident_peak() -> int:
    """Largest resident set of this process in bytes.

    Not `ru_maxrss` on Linux, where a process begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


# --- The exact savings -----------------------------------------------------------------------------------------------


class PlainAttnProcessor(AttnProcessor2_0):
    """diffusers' default under another name. Reuse leaves processors that a user set alone, so this turns it off."""


@contextmanager
def without_reuse(unet: UNet2DConditionModel):
    """Within the block, keys and values are computed in every step."""
    processors = dict(unet.attn_processors)
    unet.set_attn_processor(PlainAttnProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(processors)


def arithmetic(call: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions in a call, attention included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused kernel is not counted
        call()
    return counter.get_total_flops()


@torch.no_grad()
def savings(request: Request, steps: int, repeats: int) -> list[dict[str, Any]]:
    """What each exact saving gains in the denoising loop: measured ratio and ratio of the arithmetic."""
    pipe = request.pipe
    image_latents = pipe.encode_image(request.frame * 2 - 1)

    @torch.no_grad()
    def denoise(s_text: float, s_image: float, interval: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
        return pipe.denoise(
            request.noise,
            request.condition,
            request.null_condition,
            image_latents,
            num_inference_steps=steps,
            guidance_scale=s_text,
            image_guidance_scale=s_image,
            guidance_interval=interval,
        )

    def denoise_without_reuse() -> torch.Tensor:
        with without_reuse(pipe.unet):
            return denoise(*SCALES)

    calls = {
        "no reuse": denoise_without_reuse,
        "three passes": lambda: denoise(*SCALES),
        "two passes": lambda: denoise(SCALES[0], 1.0),
        "one pass": lambda: denoise(1.0, 1.0),
        "interval": lambda: denoise(*SCALES, (0.0, 0.5)),
    }
    rows = [
        ("reuse of keys and values, against computing them in every step", "no reuse", "three passes"),
        ("two passes (s_I = 1) against three", "three passes", "two passes"),
        ("one pass (s_T = s_I = 1) against three", "three passes", "one pass"),
        ("guidance in (0, 0.5) against all steps", "three passes", "interval"),
    ]
    operations = {name: arithmetic(call) for name, call in calls.items()}
    difference = (calls["no reuse"]() - calls["three passes"]()).abs().max().item()
    times = in_turn(calls, repeats)
    return [
        {
            "saving": saving,
            "seconds": {name: statistics.median(times[name].wall) for name in (slower, faster)},
            "measured": speed(times[slower], times[faster]),
            "arithmetic": operations[slower] / operations[faster],
            **({"max_difference": difference} if slower == "no reuse" else {}),
        }
        for saving, slower, faster in rows
    ]


def interval_quality(model: Path, pairs: int, steps: int, device: str) -> dict[str, Any]:
    """PSNR in dB against the true action frames, with guidance in all steps, half of them, and for the copied input.

    The whole checkpoint takes part, its VLM too; descriptions are the pairs' own, scales the checkpoint's, and each
    pair's noise is the same for both.

    Returns:
        row name -> {"frame", "boxes"}: means over the pairs, whole frame and inside the boxes of `boxes_1`.
    """
    pipe = LegoPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = read_manifest(FRAMES)
    rows = rows.select(range(min(pairs, len(rows))))
    frames = [row["image_0"].convert("RGB") for row in rows]
    descriptions = [row["description"] for row in rows]
    enhancements = None if pipe.vlm is None else pipe.enhance(frames, description=descriptions)

    def generate(interval: tuple[float, float]) -> torch.Tensor:
        pictures = pipe(
            frames,
            enhancement=enhancements,
            description=descriptions if enhancements is None else None,
            num_inference_steps=steps,
            guidance_interval=interval,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(frames))],
            output_type="pt",
        ).images
        return torch.as_tensor(pictures).cpu() * 2 - 1

    before, truth = to_unit(load_frames(rows)).unbind(1)  # (N, 3, H, W) each
    boxes = load_masks(rows, *truth.shape[-2:])[:, 1]
    results = {
        "input, copied": before,
        "guidance in all steps": generate((0.0, 1.0)),
        "guidance in (0, 0.5)": generate((0.0, 0.5)),
    }
    return {
        name: {
            "frame": psnr(pictures, truth).mean().item(),
            "boxes": psnr(pictures, truth, boxes).mean().item(),
        }
        for name, pictures in results.items()
    }


# --- The report ------------------------------------------------------------------------------------------------------


def measure(kind: str, config: InferenceConfig, steps: int, threads: int, device: str) -> dict[str, Any]:
    """Everything about one UNet. Memory comes first: this process then holds nothing large."""
    memory = compare_memory(kind, config.model, steps, threads, device)
    request = REQUESTS[kind](config.model, device)
    result = {
        "name": request.name,
        "steps": steps,
        "against_instruct_pix2pix": {**compare(request, steps, config.repeats), "memory": memory},
        "same_with_image_scale_1": compare(request, steps, config.repeats, (SCALES[0], 1.0)),
        "savings": savings(request, steps, config.repeats),
    }
    del request
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def bars(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The bars of the comparison: what was measured, the bar, and whether it is held."""
    comparison = result["against_instruct_pix2pix"]
    difference, memory = comparison["max_difference"], comparison["memory"]["ratio"]
    wall, processor = (comparison["speed_ratio"][clock]["median"] for clock in ("wall", "processor"))
    return {
        "max_difference": {
            "measured": difference,
            "at_most": LARGEST_DIFFERENCE,
            "held": difference <= LARGEST_DIFFERENCE,
        },
        "speed_ratio": {
            "measured": wall,
            "by_processor_time": processor,
            "at_least": SMALLEST_SPEED_RATIO,
            "held": wall >= SMALLEST_SPEED_RATIO,
        },
        "memory_ratio": {"measured": memory, "at_most": LARGEST_MEMORY_RATIO, "held": memory <= LARGEST_MEMORY_RATIO},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, diffusers {report['diffusers']}, "
        f"float32, median (range) of {report['config']['repeats']} rounds",
        "",
        "| UNet, steps | s_T, s_I | max difference | InstructPix2Pix | LEGO | speed | processor time | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in report["unets"]:
        for key in ("against_instruct_pix2pix", "same_with_image_scale_1"):
            row = result[key]
            memory = "as above"
            if "memory" in row:
                theirs, ours = (row["memory"]["mebibytes"][system]["peak"] for system in SYSTEMS)
                memory = f"{row['memory']['ratio']:.3f}x ({ours:.0f} of {theirs:.0f} MiB)"
            lines.append(
                f"| {result['name']}, {result['steps']} | {row['guidance_scale']:g}, {row['image_guidance_scale']:g} "
                f"| {row['max_difference']:.1e} | {row['seconds']['InstructPix2Pix']:.3f} s "
                f"| {row['seconds']['LEGO']:.3f} s | {_speed_columns(row['speed_ratio'])} | {memory} |"
            )
    lines += ["", "| UNet, steps | saving | speed | processor time | arithmetic |", "|---|---|---|---|---|"]
    for result in report["unets"]:
        lines += [
            f"| {result['name']}, {result['steps']} | {row['saving']}{_few_steps(row, result['steps'])} "
            f"| {_speed_columns(row['measured'])} | {row['arithmetic']:.3f}x |"
            for row in result["savings"]
        ]
    if "interval_quality" in report:
        count, steps = report["config"]["quality_pairs"], report["config"]["steps"]
        lines += [
            "",
            f"| PSNR in dB, {count} pairs, {steps} steps | whole frame | inside the boxes |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['frame']:.2f} | {row['boxes']:.2f} |" for name, row in report["interval_quality"].items()
        ]
    lines.append("")
    for result in report["unets"]:
        for name, bar in result["bars"].items():
            limit = f"at most {bar['at_most']:g}" if "at_most" in bar else f"at least {bar['at_least']:g}"
            verdict = "held" if bar["held"] else "MISSED"
            lines.append(f"- {result['name']}: {name} {bar['measured']:.3g}, {limit}: {verdict}")
    return "\n".join(lines)


def _speed_columns(speed_ratio: dict[str, dict[str, float]]) -> str:
    columns = [speed_ratio["wall"], speed_ratio["processor"]]
    return " | ".join(f"{ratio['median']:.3f}x ({ratio['low']:.3f} to {ratio['high']:.3f})" for ratio in columns)


def _few_steps(row: dict[str, Any], steps: int) -> str:
    """What is computed once per call weighs the more, the fewer the steps: a remark on the saving by reuse."""
    return f" (over {steps} steps only; more gain more)" if "max_difference" in row and steps < FEWEST_STEPS else ""


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main(config: InferenceConfig) -> dict[str, Any]:
    """Measures, prints the tables, writes `config.json`; returns what it wrote."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads_before = torch.get_num_threads()
    threads = config.threads or threads_before
    torch.set_num_threads(threads)
    try:
        unets = [measure("checkpoint", config, config.steps, threads, device)]
        if config.sd15:
            unets.append(measure("sd15", config, config.sd15_steps, threads, device))
        quality = (
            interval_quality(config.model, config.quality_pairs, config.steps, device) if config.quality_pairs else {}
        )
    finally:
        torch.set_num_threads(threads_before)
    report = {
        "device": _device_name(device),
        "threads": threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "unets": [{**result, "bars": bars(result)} for result in unets],
        **({"interval_quality": quality} if quality else {}),
    }
    print(markdown(report))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main(parse_config(InferenceConfig, __doc__))
