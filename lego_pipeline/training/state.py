"""A run's files on disk: written whole or not at all, hashed, and read with suspicion."""

import hashlib
import json
import math
import os
from pathlib import Path
from pickle import UnpicklingError

import torch

from lego_pipeline.atomic import write_text


def cut_log(path: Path, step: int) -> None:
    """Drops the lines of a JSON-lines log that are past a step, or that a kill cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flaw_of(state: Path) -> str:
    """What is wrong with a saved state, in words; empty for a whole one."""
    try:
        hashes = json.loads((state / "hashes.json").read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if hash_of(state / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return "hashes.json is not what was written"
    if "progress.json" not in hashes:
        return "hashes.json is not what was written"
    for file in state.glob("custom_checkpoint_*.pkl"):  # which accelerate would unpickle whatever they hold
        try:
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError):  # the latter for a format that torch.save has left
            return f"{file.name} holds more than tensors and numbers"
    return ""
