"""The training scripts at tiny size on pairs that come with the package: two steps, stop, two more, bit-equal weights.

Scripts run in this process through their `main`, with a clock by which every step takes a minute. That
`accelerate launch` starts them, on one process and on two, is shown by the slow tests.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file

from examples.kitchen import train_clip, train_vae
from lego_pipeline import LegoPipeline, training
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.vlm import llava
from train import cache_embeddings, train_ldm, tune_vlm

ROOT = Path(__file__).parents[2]
LAUNCHED = {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "vlm_dropout": 0.3}
RECORD_WEIGHTS = """
from safetensors.torch import save_file
from lego_pipeline.config import parse_config
from train import train_ldm

models = []

class Denoiser(train_ldm.Denoiser):
    def __init__(self, *args):
        super().__init__(*args)
        models.append(self)

class Steps(train_ldm.ResumableSteps):
    def __iter__(self):
        yield from super().__iter__()
        weights = {name: tensor.contiguous() for name, tensor in models[0].state_dict().items()}
        save_file(weights, self.output_dir / f"rank-{self.accelerator.process_index}.safetensors")

train_ldm.Denoiser, train_ldm.ResumableSteps = Denoiser, Steps
train_ldm.main(parse_config(train_ldm.TrainLdmConfig))
"""


def write_pairs(folder: Path, size: int) -> Path:
    """Six rendered pairs: four to train on, two to validate."""
    rows = [dict(row) for row in read_manifest(FRAMES).select(range(6))]
    for i, row in enumerate(rows):
        row |= {f"image_{k}": row[f"image_{k}"].convert("RGB").resize((size, size)) for k in (0, 1)}
        row["split"] = "train" if i < 4 else "val"
    rows[5]["action"] = rows[0]["action"]
    for split in ("train", "val"):
        write_shard([row for row in rows if row["split"] == split], folder / split / "000.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the tiny pipeline's size."""
    return write_pairs(tmp_path_factory.mktemp("data"), 32)


@pytest.fixture(scope="module")
def kitchen_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the kitchen's size."""
    return write_pairs(tmp_path_factory.mktemp("kitchen_data"), 128)


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


@pytest.fixture
def minute_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the training loop's clock every step takes a minute."""
    minutes = count()
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), time=time.time)
    monkeypatch.setattr(training, "time", clock)


def cache_config(data: Path, vlm: Path, cache: Path, **changes: Any) -> cache_embeddings.CacheEmbeddingsConfig:
    settings = {"batch_size": 3, "max_new_tokens": 5, **changes}
    return cache_embeddings.CacheEmbeddingsConfig(data=data, vlm=str(vlm), cache=cache, **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files below a folder, under "file:name"."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def assert_equal_weights(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    a, b = weights(first), weights(second)
    assert a
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def changed_components(start: Path, trained: Path) -> set[str]:
    """Components of a pipeline folder with a weight that differs from the start's."""
    before, after = weights(start), weights(trained)
    return {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def launch(launcher: list[str], script: Path, *arguments: Any) -> None:
    """A script started by a launcher module in a subprocess on the CPU; its output is shown if it fails."""
    command = [sys.executable, "-m", *launcher, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def launched_flags(data: Path, pipeline: Path, cache: Path, output_dir: Path) -> list[Any]:
    flags = ["--data", data, "--pipeline", pipeline, "--cache", cache, "--output-dir", output_dir]
    for name, value in LAUNCHED.items():
        flags += [f"--{name.replace('_', '-')}", value]
    return flags


def vlm_config(data: Path, vlm: Path, output_dir: Path, **changes: Any) -> tune_vlm.TuneVlmConfig:
    settings = {"batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 1, **changes}
    return tune_vlm.TuneVlmConfig(data=data / "train", vlm=str(vlm), output_dir=output_dir, **settings)


def ldm_config(data: Path, pipeline: Path, output_dir: Path, **changes: Any) -> train_ldm.TrainLdmConfig:
    settings = {
        "batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "validate_every_steps": 2,
        "condition_dropout": 0.2,
        "vlm_dropout": 0.3,
        "box_weight": 3.0,
        "timestep_sampling": "log_normal",
        **changes,
    }
    return train_ldm.TrainLdmConfig(data=data, pipeline=pipeline, output_dir=output_dir, **settings)


def test_tuning_in_two_slices_gives_the_weights_of_one(
    data: Path, vlm_folder: Path, tmp_path: Path, minute_clock: None
) -> None:
    tune_vlm.main(vlm_config(data, vlm_folder, tmp_path / "whole"))
    sliced = vlm_config(data, vlm_folder, tmp_path / "sliced", max_minutes=1.5)
    tune_vlm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 2, "finished": False}
    tune_vlm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 4, "finished": True}
    assert_equal_weights(tmp_path / "whole" / "vlm", tmp_path / "sliced" / "vlm")


def test_tuning_trains_all_but_the_vision_tower(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    tune_vlm.main(vlm_config(data, vlm_folder, tmp_path, max_steps=1, warmup_steps=0))
    before, after = weights(vlm_folder), weights(tmp_path / "vlm")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "vision_tower" in name}


def test_tuning_refuses_rows_without_a_description(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in read_manifest(data / "train")]
    rows[1]["description"] = None
    write_shard(rows, tmp_path / "train" / "000.parquet")
    with pytest.raises(ValueError, match="must have a description in every row"):
        tune_vlm.main(vlm_config(tmp_path, vlm_folder, tmp_path / "run"))


def test_caching_twice_calls_the_vlm_once(
    data: Path, vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(vlm: Any, processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(len(images))
            return function(vlm, processor, images, *args, **kwargs)

        return call

    monkeypatch.setattr(llava, "generate", counted(llava.generate))
    monkeypatch.setattr(llava, "embed", counted(llava.embed))
    cache_embeddings.main(cache_config(data, vlm_folder, tmp_path))
    assert sum(calls) == 2 * 4  # four rows described, then embedded
    cache_embeddings.main(cache_config(data, vlm_folder, tmp_path))
    assert sum(calls) == 2 * 4


def test_caching_in_other_batches_gives_the_same_descriptions(
    data: Path, vlm_folder: Path, cache: Path, tmp_path: Path
) -> None:
    cache_embeddings.main(cache_config(data, vlm_folder, tmp_path, batch_size=1))
    first, second = EmbeddingCache(cache), EmbeddingCache(tmp_path)
    keys = pq.read_table(tmp_path / "pairs-train-000-of-001.pairs")["text_key"].to_pylist()
    assert keys == pq.read_table(cache / "pairs-train-000-of-001.pairs")["text_key"].to_pylist()
    assert [first.description(key) for key in keys] == [second.description(key) for key in keys]


def test_the_ldm_in_two_slices_has_the_weights_of_one(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, minute_clock: None
) -> None:
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path / "whole", cache=cache))
    sliced = ldm_config(data, tiny_folder, tmp_path / "sliced", cache=cache, max_minutes=1.5)
    train_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 2, "finished": False}
    train_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 4, "finished": True}
    assert_equal_weights(tmp_path / "whole" / "pipeline", tmp_path / "sliced" / "pipeline")
    validated = (tmp_path / "whole" / "validation.jsonl").read_text()
    assert validated == (tmp_path / "sliced" / "validation.jsonl").read_text()


def test_the_ldm_trains_unet_and_projector_alone(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path, cache=cache, max_steps=2, warmup_steps=0))
    assert changed_components(tiny_folder, tmp_path / "pipeline") == {"unet", "projector"}


def test_frozen_projections_stay_as_they_are(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    config = ldm_config(data, tiny_folder, tmp_path, cache=cache, max_steps=2, warmup_steps=0, freeze_projections=True)
    train_ldm.main(config)
    assert changed_components(tiny_folder, tmp_path / "pipeline") == {"unet"}


def test_without_a_cache_the_ldm_learns_from_labels_and_says_so(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path, max_steps=2, warmup_steps=0, vlm_dropout=0.0))
    assert changed_components(tiny_folder, tmp_path / "pipeline") == {"unet"}
    assert LegoPipeline.from_pretrained(tmp_path / "pipeline").config["vlm_dropout"] is True


def test_a_trained_folder_draws(
    data: Path, tiny_folder: Path, cache: Path, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path, cache=cache, max_steps=1))
    pipeline = LegoPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(frame, action="open drawer", num_inference_steps=1).images[0].size == frame.size


def test_the_ldm_names_pairs_that_the_cache_lacks(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    for file in cache.glob("*"):
        shutil.copy(file, tmp_path / file.name)
    pairs = tmp_path / "pairs-train-000-of-001.pairs"
    pq.write_table(pq.read_table(pairs).slice(1), pairs)
    with pytest.raises(ValueError, match="`cache` must hold every pair of the split 'train'.* lacks 1"):
        train_ldm.main(ldm_config(data, tiny_folder, tmp_path / "run", cache=tmp_path))


def test_the_ldm_encodes_frames_once(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path, cache=cache, max_steps=1))
    assert len(list(tmp_path.glob("latents-train-*"))) == len(list(tmp_path.glob("latents-val-*"))) == 1

    def encode(*args: Any) -> None:
        raise AssertionError("frames are encoded again")

    monkeypatch.setattr(train_ldm.PairTensors, "_encode_frames", encode)
    train_ldm.main(ldm_config(data, tiny_folder, tmp_path, cache=cache, max_steps=2))
    assert report(tmp_path)["step"] == 2


def test_latents_are_found_by_autoencoder_size_ids_and_frames(data: Path, tiny_folder: Path) -> None:
    rows = read_manifest(data / "train")
    keys = [train_ldm.latents_key(LegoPipeline.from_pretrained(tiny_folder), rows) for _ in range(2)]
    assert keys[0] == keys[1]
    pipeline = LegoPipeline.from_pretrained(tiny_folder)
    keys += [train_ldm.latents_key(pipeline, rows.select(order)) for order in ([0, 1, 2], [1, 0, 2, 3])]
    swapped = rows.rename_columns({"image_0": "image_1", "image_1": "image_0"})
    keys.append(train_ldm.latents_key(pipeline, swapped))
    pipeline.register_to_config(resolution=64)
    keys.append(train_ldm.latents_key(pipeline, rows))
    next(pipeline.vae.parameters()).data[0] += 1
    keys.append(train_ldm.latents_key(pipeline, rows))
    pipeline.vae.register_to_config(scaling_factor=0.5)
    keys.append(train_ldm.latents_key(pipeline, rows))
    assert len(set(keys)) == len(keys) - 1


def test_frames_in_files_of_a_metadata_folder_are_found_by_content(
    data: Path, tiny_folder: Path, make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
) -> None:
    pipeline, keys = LegoPipeline.from_pretrained(tiny_folder), set()
    row = {"id": "a", "action": "open drawer", "split": "train"}
    row |= {f"image_{k}_file_name": f"{k}.png" for k in (0, 1)}
    for size in (32, 48):
        folder = tmp_path / str(size)
        folder.mkdir()
        for k in (0, 1):
            make_frame(size, size).save(folder / f"{k}.png")
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        keys.add(train_ldm.latents_key(pipeline, read_manifest(folder)))
    assert len(keys) == 2


@pytest.mark.parametrize("template", ["What?", "{} and {}"])
def test_a_question_has_one_place_for_the_action(template: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`question_template` must have exactly one {}"):
        vlm_config(data, tmp_path, tmp_path, question_template=template)
    with pytest.raises(ValueError, match="`question_template` must have exactly one {}"):
        cache_config(data, tmp_path, tmp_path, question_template=template)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_targets_are_those_of_the_schedulers(prediction_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    timestep = torch.tensor([400])
    alpha = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timestep)
    target = train_ldm.diffusion_target(prediction_type, clean, noise, alpha)
    scheduler.set_timesteps(1000)
    result = scheduler.step(target, 400, noisy).pred_original_sample
    assert torch.allclose(result, clean, atol=1e-4)


def test_box_weights_reach_every_cell_that_a_box_touches() -> None:
    box = {"x0": 0.3, "y0": 0.0, "x1": 0.5, "y1": 0.26}
    weights = train_ldm.box_weights([[box], []], 4, 4, 3.0)
    expected = torch.ones(2, 4, 4)
    expected[0, 0:2, 1:2] = 3
    assert torch.equal(weights, expected)


def test_log_normal_timesteps_lie_around_the_wished_noise_level(data: Path) -> None:
    config = train_ldm.TrainLdmConfig(data=data, pipeline=data, timestep_sampling="log_normal", log_sigma_mean=1.0)
    alphas = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    with torch.random.fork_rng():
        torch.manual_seed(0)
        timesteps = train_ldm.draw_timesteps(2000, alphas, config)
    log_sigma = 0.5 * torch.log((1 - alphas[timesteps]) / alphas[timesteps])
    assert abs(log_sigma.median() - 1.0) < 0.1


def test_the_kitchens_autoencoder_in_two_slices_has_the_weights_of_one(
    kitchen_data: Path, tmp_path: Path, minute_clock: None
) -> None:
    def config(folder: str, **changes: Any) -> train_vae.TrainVaeConfig:
        settings = {"batch_size": 2, "max_steps": 4, "warmup_steps": 1, **changes}
        return train_vae.TrainVaeConfig(data=kitchen_data, output_dir=tmp_path / folder, **settings)

    train_vae.main(config("whole"))
    train_vae.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["step"] == 2
    train_vae.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["finished"]
    assert_equal_weights(tmp_path / "whole" / "vae", tmp_path / "sliced" / "vae")


def test_the_kitchens_clip_in_two_slices_has_the_weights_of_one(
    kitchen_data: Path, tmp_path: Path, minute_clock: None
) -> None:
    def config(folder: str, **changes: Any) -> train_clip.TrainClipConfig:
        settings = {"batch_size": 3, "max_steps": 4, "warmup_steps": 1, **changes}
        return train_clip.TrainClipConfig(data=kitchen_data, output_dir=tmp_path / folder, **settings)

    train_clip.main(config("whole"))
    train_clip.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["step"] == 2
    train_clip.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["finished"]
    for tower in ("text_encoder", "vision_tower"):
        assert_equal_weights(tmp_path / "whole" / tower, tmp_path / "sliced" / tower)


def test_equal_texts_are_all_right_answers_for_a_frame() -> None:
    similarity = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    right = train_clip.contrastive_loss(similarity, ["open", "open", "close"])
    wrong = train_clip.contrastive_loss(similarity, ["open", "close", "open"])
    assert right < 0.5 < wrong


@pytest.mark.slow
def test_accelerate_launch_runs_the_ldm_script(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    flags = launched_flags(data, tiny_folder, cache, tmp_path / "launched")
    launch(["accelerate.commands.launch", "--cpu"], ROOT / "train" / "train_ldm.py", *flags)
    assert report(tmp_path / "launched") == {"step": 2, "finished": True}
    config = {"data": data, "pipeline": tiny_folder, "cache": cache, "output_dir": tmp_path / "here", **LAUNCHED}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the launched process: sums of several threads round differently
    try:
        train_ldm.main(train_ldm.TrainLdmConfig(**config))
    finally:
        torch.set_num_threads(threads)
    assert_equal_weights(tmp_path / "launched" / "pipeline", tmp_path / "here" / "pipeline")


@pytest.mark.slow
def test_two_processes_train_one_model_and_stop_together(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    script, output_dir = tmp_path / "record.py", tmp_path / "run"
    script.write_text(RECORD_WEIGHTS)
    flags = launched_flags(data, tiny_folder, cache, output_dir)
    # `accelerate launch --cpu --num_processes 2` wants mpirun, and without it starts one process and says nothing.
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch(launcher, script, *flags, "--max-minutes", "0.00001")
    assert report(output_dir) == {"step": 1, "finished": False}
    launch(launcher, script, *flags)
    assert report(output_dir) == {"step": 2, "finished": True}
    first, second = (load_file(output_dir / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert changed_components(tiny_folder, output_dir / "pipeline") == {"unet", "projector"}
