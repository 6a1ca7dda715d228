"""The training scripts at tiny size on pairs that come with the package: two steps, stop, two more, bit-equal weights.

Scripts run in this process through their `main`; a clock that the tests turn says when a slice is over. How
`accelerate launch` starts them is tested in the slow tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lego_pipeline import LegoPipeline, training
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.vlm import llava
from train import cache_embeddings, train_ldm, tune_vlm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rendered pairs at 32 pixels: four to train on, two to validate."""
    folder = tmp_path_factory.mktemp("data")
    rows = [dict(row) for row in read_manifest(FRAMES).select(range(6))]
    for i, row in enumerate(rows):
        row |= {f"image_{k}": row[f"image_{k}"].convert("RGB").resize((32, 32)) for k in (0, 1)}
        row["split"] = "train" if i < 4 else "val"
    for split in ("train", "val"):
        write_shard([row for row in rows if row["split"] == split], folder / split / "000.parquet")
    return folder


@pytest.fixture(scope="module")
def vlm_folder(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    tiny_components["vlm"].save_pretrained(folder)
    tiny_components["vlm_processor"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(data: Path, vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    for split in ("train", "val"):
        cache_embeddings.main(cache_config(data, vlm_folder, folder, split=split))
    return folder


def cache_config(data: Path, vlm: Path, cache: Path, **changes: Any) -> cache_embeddings.CacheEmbeddingsConfig:
    settings = {"data": data, "vlm": str(vlm), "cache": cache, "batch_size": 3, "max_new_tokens": 5, **changes}
    return cache_embeddings.CacheEmbeddingsConfig(**settings)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`stop_after(n)`: every reading of the training loop's clock is a minute later; slices end after n of them."""

    def minutes() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 60.0

    clock = minutes()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def assert_equal(first: Path, second: Path) -> None:
    """The folders hold bit-equal weights."""
    a, b = weights(first), weights(second)
    assert a and a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_smoke(data, vlm_folder, cache, tiny_folder, tmp_path, stop_after):
    import time
    t=time.time()
    c = dict(data=data / "train", vlm=str(vlm_folder), batch_size=2, max_steps=4, learning_rate=1e-3)
    tune_vlm.main(tune_vlm.TuneVlmConfig(output_dir=tmp_path / "a", **c))
    tune_vlm.main(tune_vlm.TuneVlmConfig(output_dir=tmp_path / "b", max_minutes=1.5, **c))
    assert json.loads((tmp_path/"b"/"report.json").read_text()) == {"step": 2, "finished": False}
    tune_vlm.main(tune_vlm.TuneVlmConfig(output_dir=tmp_path / "b", max_minutes=1.5, **c))
    assert_equal(tmp_path / "a" / "vlm", tmp_path / "b" / "vlm")
    print("vlm", time.time()-t)
    c = dict(data=data, pipeline=tiny_folder, cache=cache, batch_size=2, max_steps=4, learning_rate=1e-3, validate_every_steps=2, vlm_dropout=0.3, box_weight=3.0)
    train_ldm.main(train_ldm.TrainLdmConfig(output_dir=tmp_path / "c", **c))
    train_ldm.main(train_ldm.TrainLdmConfig(output_dir=tmp_path / "d", max_minutes=1.5, **c))
    train_ldm.main(train_ldm.TrainLdmConfig(output_dir=tmp_path / "d", max_minutes=1.5, **c))
    assert_equal(tmp_path / "c" / "pipeline", tmp_path / "d" / "pipeline")
    print("ldm", time.time()-t)
    import os
    os.system(f"find {tmp_path}; cat {tmp_path}/*/validation.jsonl")
