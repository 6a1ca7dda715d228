"""Starting a training script: accelerator and trackers, what was decided, and what the run was made with."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
)
from diffusers.optimization import SchedulerType

from lego_pipeline.atomic import write_text
from lego_pipeline.config import plain_values, section_of, to_yaml
from lego_pipeline.training.order import check_weights

logger = logging.getLogger(__name__)

# Settings that leave the result alone, or that are compared in another way (the batch as a whole, max_steps).
FREE_SETTINGS = frozenset(
    {"output_dir", "max_steps", "max_minutes", "save_every_minutes", "save_every_steps", "log_every_steps"}
    | {"report_to", "expect_processes", "num_workers", "batch_size", "gradient_accumulation_steps"}
)
# Fields that scripts share: the least that each may be.
COUNTS = ("batch_size", "gradient_accumulation_steps", "max_steps", "log_every_steps")
NOT_NEGATIVE = ("max_minutes", "save_every_minutes", "save_every_steps", "learning_rate", "warmup_steps",
                "weight_decay", "num_workers", "expect_processes")  # fmt: skip
LONGEST_WAIT = timedelta(days=14)
PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT)  # wants rules
REPORTED_PACKAGES = ("lego-pipeline", "torch", "accelerate", "diffusers", "transformers", "peft", "datasets",
                     "safetensors", "tokenizers", "numpy", "pillow", "bitsandbytes", "deepspeed")  # fmt: skip


class LaunchSettings(Protocol):
    """What `start_accelerator` reads of a script's settings."""

    output_dir: Path
    batch_size: int  # samples of one process and micro-batch
    gradient_accumulation_steps: int
    mixed_precision: str  # no, fp16 or bf16
    report_to: str  # tensorboard, wandb, all or none
    expect_processes: int  # 0 for any number


def check_settings(config: Any) -> None:
    """The rules for settings that training scripts share, of those that a script has; for its `__post_init__`.

    Raises:
        ValueError: one of them is broken.
    """
    for names, least in ((COUNTS, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            check_number(config, name, least)
    check_number(config, "max_grad_norm", above=0)
    for name, known in (("mixed_precision", PRECISIONS), ("lr_scheduler", SCHEDULES)):
        value = getattr(config, name, known[0])
        if value not in known:
            raise ValueError(f"`{name}` must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}.")
    if hasattr(config, "data") and not config.data:
        raise ValueError("`data` must name at least one manifest, got none.")
    if hasattr(config, "data_weights"):
        check_weights(config.data_weights, len(config.data))


def check_number(
    config: Any, name: str, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """The rule for a numeric setting; one that is None, or that the script doesn't have, passes.

    Args:
        config: a script's dataclass.
        name: of the field.
        least, most: bounds that it may take.
        above: a bound that it may not take.

    Raises:
        ValueError: it is out of range, infinite or no number.
    """
    value = getattr(config, name, None)
    if value is None or (least <= value <= most and above < value and math.isfinite(value)):
        return
    bounds = [f"at least {least}"] * (least > -math.inf) + [f"above {above}"] * (above > -math.inf)
    bounds += [f"at most {most}"] * (most < math.inf)
    raise ValueError(f"`{name}` must be {' and '.join(bounds) or 'finite'}, got {value}.")


def start_accelerator(config: LaunchSettings) -> Accelerator:
    """The accelerator of a training script, with its trackers; what was decided, and why, is logged.

    Close the trackers with `accelerator.end_training()` at the end of the script.

    Raises:
        ValueError: unknown `report_to`; another number of processes than expected, or processes that don't know of one
            another; FSDP or DeepSpeed asked for, but accelerate runs without; a launch configuration that accumulates
            otherwise.
        ImportError: wandb asked for and not installed. Without tensorboard the run goes on without a tracker.
    """
    trackers = _trackers(config.report_to)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(config.output_dir / "trackers")
        ),
    )
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {config.output_dir}; name another one.")
    check_processes(config.expect_processes, accelerator.num_processes)
    for name, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if asked and accelerator.distributed_type != kind:
            raise ValueError(
                f"the launch configuration must be one that this machine can run, got {name} on "
                f"{accelerator.device.type}, for which accelerate quietly took {accelerator.distributed_type.value}; "
                f"{name} needs GPUs, start without it here."
            )
    if (
        accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps
    ):  # DeepSpeed's launcher sets its own
        raise ValueError(
            "`gradient_accumulation_steps` must be that of the launch configuration, got "
            f"{config.gradient_accumulation_steps} and {accelerator.gradient_accumulation_steps}; set both alike."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which else looks for a data loader to read it from
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if accelerator.is_main_process:
        if launched not in ("no", config.mixed_precision):
            logger.warning(
                "the launcher's mixed precision %s has no effect: `mixed_precision` is %s",
                *(launched, config.mixed_precision),
            )
        config.output_dir.mkdir(parents=True, exist_ok=True)
        logger.info(_decisions(config, accelerator, trackers))
    if trackers:
        accelerator.init_trackers(section_of(type(config)))
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # which would open another run for them
                tracker.store_init_configuration(plain_values(config))
    return accelerator


def long_waits() -> InitProcessGroupKwargs:
    """For an `Accelerator` whose processes meet only at the end: they wait for the slowest, not for minutes."""
    return InitProcessGroupKwargs(timeout=LONGEST_WAIT)


def check_processes(expected: int, found: int) -> None:
    """Refuses a run with another number of processes than expected, 0 for any.

    `torchrun` on a CPU starts processes that don't know of one another, each of which would do the whole work.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    wanted = expected or started
    if wanted != found or started > found:
        raise ValueError(
            f"`expect_processes` must be the number of processes that run, got {wanted} and {found} runs; on a CPU "
            f"start them with `ACCELERATE_USE_CPU=true torchrun --nproc-per-node {wanted} {sys.argv[0]} ...`, on GPUs "
            f"with `accelerate launch --num_processes {wanted} {sys.argv[0]} ...`."
        )


def _trackers(report_to: str) -> list[Any]:
    known = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if report_to not in (*known, "all", "none"):
        raise ValueError(f"`report_to` must be tensorboard, wandb, all or none, got {report_to!r}.")
    if report_to == "wandb" and not is_wandb_available():
        raise ImportError("`report_to` is wandb, which is not installed; run `pip install wandb`.")
    asked = [] if report_to == "none" else list(known) if report_to == "all" else [report_to]
    trackers = [name for name in asked if known[name]()]
    if asked and not trackers:
        logger.info('no tracker is installed, log.jsonl has it all; `pip install "lego-pipeline[train]"` brings one')
    return trackers


def _decisions(config: LaunchSettings, accelerator: Accelerator, trackers: list[Any]) -> str:
    processes, accumulated = accelerator.num_processes, config.gradient_accumulation_steps
    device = str(accelerator.device)
    if accelerator.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    elif accelerator.device.type == "cpu":
        device += " (ACCELERATE_USE_CPU is set)" if torch.cuda.is_available() else " (no GPU is visible)"
    dtype = {"no": "float32 throughout", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}
    together, factors = "one process", [f"batch {config.batch_size}"]
    if processes > 1:
        together = f"{processes} processes joined by {accelerator.distributed_type.value.lower()}"
        factors.append(f"{processes} processes")
    if accumulated > 1:
        factors.append(f"{accumulated} accumulated")
    return (
        f"device {device}, {dtype.get(config.mixed_precision, config.mixed_precision)} (`mixed_precision` is "
        f"{config.mixed_precision}), {together}; a step takes {' x '.join(factors)} = "
        f"{config.batch_size * accumulated * processes} samples; tracker {', '.join(trackers) or 'none'}"
    )


def resume_settings(config: Any, free: Collection[str] = ()) -> dict[str, Any]:
    """The settings that a resumed run must share with the one before, as JSON holds them.

    Args:
        config: a script's dataclass.
        free: names of fields that leave the result alone, beside FREE_SETTINGS (validation, pictures).
    """
    return {name: value for name, value in plain_values(config).items() if name not in FREE_SETTINGS.union(free)}


def write_run_files(config: Any, accelerator: Accelerator) -> None:
    """Writes the settings to `output_dir/config.yaml` and what they ran on to `output_dir/environment.json`."""
    if not accelerator.is_main_process:
        return
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(config.output_dir / "config.yaml", to_yaml(config))
    versions = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = accelerator.device
    environment = {
        "command": sys.argv,
        "git": _git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
    }
    write_text(config.output_dir / "environment.json", json.dumps(environment, indent=1) + "\n")


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a source tree and whether files differ from it; None for an installed package."""
    try:
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
