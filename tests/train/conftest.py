"""What the tests of the training scripts share: a few pairs, folders of tiny VLMs, a clock."""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.training import steps


def write_pairs(folder: Path, side: int) -> Path:
    """Six rendered pairs of a size: four to train on, two to validate (one action is in both)."""
    rows = [dict(row) for row in read_manifest(FRAMES).select(range(6))]
    for i, row in enumerate(rows):
        row |= {f"image_{k}": row[f"image_{k}"].convert("RGB").resize((side, side)) for k in (0, 1)}
        row["split"] = "train" if i < 4 else "val"
    rows[5]["action"] = rows[0]["action"]
    for split in ("train", "val"):
        write_shard([row for row in rows if row["split"] == split], folder / split / "000.parquet")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the tiny pipeline's size."""
    return write_pairs(tmp_path_factory.mktemp("data"), 32)


@pytest.fixture(scope="session")
def kitchen_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the kitchen's size."""
    return write_pairs(tmp_path_factory.mktemp("kitchen_data"), 128)


@pytest.fixture(scope="session")
def vlm_folder(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's LLaVA with its processor."""
    folder = tmp_path_factory.mktemp("llava")
    for name in ("vlm", "vlm_processor"):
        tiny_components[name].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tiny_qwen_vlm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with its processor."""
    folder = tmp_path_factory.mktemp("qwen")
    for part in tiny_qwen_vlm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def minute_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the training loop's clock every step takes a minute."""
    minutes = count()
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), time=time.time)
    monkeypatch.setattr(steps, "time", clock)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps device and precision of a process for good; scripts of one process each may differ in them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
