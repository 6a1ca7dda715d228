"""train_ldm.py at tiny size on pairs that come with the package, run in this process through its `main`.

By the training loop's clock every step of a sliced run takes a minute. Launchers and two processes are in the slow
tests.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.config import parse_config
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.data.mirror import mirror_image, mirror_text
from lego_pipeline.data.pairs import VALIDATION_STEP, Draws
from lego_pipeline.diffusion_step import timestep_weights
from lego_pipeline.enhance import fill_cache, make_recipe, vlm_id
from lego_pipeline.images import to_model_input
from lego_pipeline.projector import LegoProjector
from lego_pipeline.vlm.base import DEFAULT_QUESTION
from train import train_ldm

ROOT = Path(__file__).parents[2]
SIZE = 32  # pixels, of the tiny pipeline
LAUNCHED = {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "vlm_dropout": 0.3, "report_to": "none"}


def write_pairs(folder: Path, sizes: list[tuple[int, int]], **changes: Any) -> Path:
    """Rendered pairs of the given sizes: the last two to validate, the others to train on."""
    rows = [dict(row) for row in read_manifest(FRAMES).select(range(len(sizes)))]
    for row, size, split in zip(rows, sizes, ["train"] * (len(sizes) - 2) + ["val"] * 2, strict=True):
        row |= {f"image_{k}": row[f"image_{k}"].convert("RGB").resize(size) for k in (0, 1)}
        row |= {"split": split, **changes}
    for split in ("train", "val"):
        write_shard([row for row in rows if row["split"] == split], folder / split / "000.parquet")
    return folder


def write_cache(
    folder: Path, data: list[Path], vlm: Any, processor: Any, *, mirrored: bool = False, **how: Any
) -> Path:
    """Embeddings of all pairs, in single precision."""
    recipe = make_recipe(vlm, processor, question_template=DEFAULT_QUESTION, max_new_tokens=5, **how)
    cache = EmbeddingCache(folder, dtype="float32")
    for rows in map(read_manifest, data):
        for row in rows:
            for mirror in (False, True) if mirrored else (False,):
                texts = [row["action"], *([row["description"]] if recipe.descriptions == "manifest" else [])]
                action, *description = [mirror_text(text) if mirror else text for text in texts]
                frame = mirror_image(row["image_0"]) if mirror else row["image_0"]
                fill_cache(vlm, processor, cache, recipe, [frame], [action], description or None)
    cache.write()
    return folder


@pytest.fixture(scope="module")
def cache(data: Path, tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    return write_cache(tmp_path_factory.mktemp("cache"), [data], vlm, processor)


@pytest.fixture(scope="module")
def calm_folder(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a projector that has no dropout of its own, which depends on process and batch."""
    pipe = make_tiny_pipeline()
    sizes = {name: value for name, value in pipe.projector.config.items() if not name.startswith("_")}
    projector = LegoProjector(**{**sizes, "dropout": 0.0})
    projector.load_state_dict(pipe.projector.state_dict())
    pipe.register_modules(projector=projector)
    folder = tmp_path_factory.mktemp("calm") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def settings(manifest: Path, pipeline: Path, output_dir: Path, **changes: Any) -> train_ldm.TrainLdmConfig:
    values: dict[str, Any] = {
        "batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "validate_every_steps": 2,
        "log_every_steps": 1,
        "report_to": "none",
        "embeddings": "cache" if "cache" in changes else "none",
        "data": (manifest,),
        **changes,
    }
    return train_ldm.TrainLdmConfig(pipeline=pipeline, output_dir=output_dir, **values)


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


def gradients(folder: Path) -> torch.Tensor:
    """Of the first step, all in one vector: the optimiser's first moments after it, a tenth of them."""
    state = torch.load(folder / "state" / "step-1" / "optimizer.bin", weights_only=True)["state"]
    return torch.cat([state[number]["exp_avg"].flatten() for number in sorted(state)])


def assert_close_gradients(first: Path, second: Path) -> None:
    """Weights would not do: Adam makes whole steps of gradients that are nothing but rounding."""
    a, b = gradients(first), gradients(second)
    assert a.norm() > 1e-3
    assert (a - b).norm() < 1e-4 * a.norm()


def changed_components(start: Path, trained: Path) -> set[str]:
    """Components of a pipeline folder with a weight that differs from the start's."""
    before, after = weights(start), weights(trained)
    return {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def quiet(folder: Path, **components: Any) -> LegoPipeline:
    pipe = LegoPipeline.from_pretrained(folder, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: LegoPipeline, frame: PIL.Image.Image) -> torch.Tensor:
    """Of a fixed description and noise, four steps, (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "generator": generator}
    images: Any = pipe(frame, description="the hand opens it", **options).images
    return images


# --- Resuming -------------------------------------------------------------------------------------------------------

MANY = {"condition_dropout": 0.2, "vlm_dropout": 0.3, "box_weight": 3.0, "timestep_sampling": "log_normal"}
ONE_STEP = {**MANY, "max_steps": 1, "validation_split": None}
TWO_STEPS = {"max_steps": 2, "validation_split": None}


@pytest.mark.parametrize(
    "changes",
    [
        {**MANY},
        {"lora_rank": 2, "num_workers": 1, "gradient_checkpointing": True},
        {"precompute": False, "gradient_accumulation_steps": 2, "batch_size": 1, "ema_decay": 0.0},
    ],
    ids=["all weights", "lora and workers", "accumulated on the fly"],
)
def test_two_slices_give_the_weights_of_one_run(
    changes: dict[str, Any], data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, minute_clock: None
) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path / "whole", cache=cache, **changes))
    sliced = settings(data, tiny_folder, tmp_path / "sliced", cache=cache, max_minutes=1.5, **changes)
    train_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 2, "finished": False}
    train_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 4, "finished": True}
    for folder in ("last", "best"):
        assert_equal_weights(tmp_path / "whole" / folder, tmp_path / "sliced" / folder)
    validated = lines(tmp_path / "whole" / "validation.jsonl")
    assert [line["step"] for line in validated] == [0, 2, 4]
    assert validated == lines(tmp_path / "sliced" / "validation.jsonl")


def test_a_longer_run_goes_on_and_keeps_one_line_of_each_validation(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    for max_steps in (2, 4):
        train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=max_steps))
    assert [line["step"] for line in lines(tmp_path / "validation.jsonl")] == [0, 2, 4]
    assert report(tmp_path) == {"step": 4, "finished": True}


def test_precomputed_or_on_the_fly_it_learns_the_same(
    data: Path, calm_folder: Path, cache: Path, tmp_path: Path
) -> None:
    for name, precompute in (("stored", True), ("fly", False)):
        train_ldm.main(settings(data, calm_folder, tmp_path / name, cache=cache, precompute=precompute, **ONE_STEP))
    assert_close_gradients(tmp_path / "stored", tmp_path / "fly")


def test_accumulated_batches_learn_what_one_large_batch_does(
    data: Path, calm_folder: Path, cache: Path, tmp_path: Path
) -> None:
    train_ldm.main(settings(data, calm_folder, tmp_path / "large", cache=cache, batch_size=4, **ONE_STEP))
    parts = {"batch_size": 1, "gradient_accumulation_steps": 4}
    train_ldm.main(settings(data, calm_folder, tmp_path / "parts", cache=cache, **parts, **ONE_STEP))
    assert_close_gradients(tmp_path / "large", tmp_path / "parts")
    losses = [lines(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("large", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_frames_and_texts_are_encoded_once(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=1))

    def encode(*args: Any) -> None:
        raise AssertionError("frames are encoded again")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=2))
    assert report(tmp_path)["step"] == 2


# --- What is trained ------------------------------------------------------------------------------------------------


def test_unet_and_projector_alone_are_trained(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=2))
    assert changed_components(tiny_folder, tmp_path / "last") == {"unet", "projector"}
    assert changed_projections(tiny_folder, tmp_path / "last") == {"image_projection", "text_projection", "text_mixer"}


def changed_projections(before: Path, after: Path) -> set[str]:
    return {
        name.split(":")[1].split(".")[0]
        for name, tensor in weights(after).items()
        if name.startswith("projector") and not torch.equal(tensor, weights(before)[name])
    }


def test_a_part_of_the_vlm_is_learnt_from_alone(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=2, vlm_parts="image"))
    assert changed_projections(tiny_folder, tmp_path / "last") == {"image_projection"}


def test_frozen_projections_stay_as_they_are(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=2, freeze_projections=True))
    assert changed_components(tiny_folder, tmp_path / "last") == {"unet"}


def test_without_embeddings_it_learns_from_labels_and_says_so(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, max_steps=2))
    assert changed_components(tiny_folder, tmp_path / "last") == {"unet"}
    assert LegoPipeline.from_pretrained(tmp_path / "last").config["vlm_dropout"] is True


def test_without_an_average_the_trained_weights_are_saved(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path / "plain", ema_decay=0.0))
    train_ldm.main(settings(data, tiny_folder, tmp_path / "averaged", ema_decay=0.9999))
    state = load_file(tmp_path / "averaged" / "state" / "step-4" / "model.safetensors")
    name = "conv_in.weight"
    plain, averaged = (
        load_file(tmp_path / run / "last" / "unet" / "diffusion_pytorch_model.safetensors")[name]
        for run in ("plain", "averaged")
    )
    assert torch.equal(plain, state[f"unet.{name}"])
    assert not torch.equal(averaged, plain)


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_on_the_fly_gives_what_a_cache_of_the_manifests_descriptions_does(
    data: Path, calm_folder: Path, tiny_components: dict[str, Any], tmp_path: Path
) -> None:
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    cache = write_cache(tmp_path / "cache", [data], vlm, processor, descriptions="manifest")
    train_ldm.main(settings(data, calm_folder, tmp_path / "cached", cache=cache, **ONE_STEP))
    train_ldm.main(settings(data, calm_folder, tmp_path / "fly", embeddings="on_the_fly", **ONE_STEP))
    assert_close_gradients(tmp_path / "cached", tmp_path / "fly")


def test_on_the_fly_generates_descriptions_that_the_manifest_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", [(SIZE, SIZE)] * 4, description=None)
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", embeddings="on_the_fly", max_steps=1))
    assert changed_components(tiny_folder, tmp_path / "run" / "last") == {"unet", "projector"}


def test_on_the_fly_without_a_vlm_is_refused(
    data: Path, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="`embeddings` on_the_fly needs a VLM"):
        train_ldm.main(settings(data, tmp_path / "start", tmp_path / "run", embeddings="on_the_fly"))


def test_training_starts_from_a_stable_diffusion_folder(
    data: Path, cache: Path, tiny_components: dict[str, Any], frame: PIL.Image.Image, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {name: tiny_components[name] for name in ("vae", "text_encoder", "tokenizer")}
    parts["scheduler"] = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    unet = type(tiny_components["unet"]).from_config(tiny_components["unet"].config, in_channels=6)
    StableDiffusionPipeline(**parts, unet=unet).save_pretrained(tmp_path / "start")
    vlm = tmp_path / "vlm"
    tiny_components["vlm"].save_pretrained(vlm)
    tiny_components["vlm_processor"].save_pretrained(vlm)
    train_ldm.main(settings(data, tmp_path / "start", tmp_path, cache=cache, vlm=vlm, resolution=SIZE))
    pipe = quiet(tmp_path / "last")
    assert pipe.unet.config["in_channels"] == 12
    assert pipe.unet.conv_in.weight[:, 6:].abs().max() > 0
    assert pipe.projector.config["num_image_tokens"] == 4
    assert pipe(frame, action="open drawer", num_inference_steps=1).images[0].size == frame.size


def test_another_prediction_is_trained_and_saved(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for name, kind in (("plain", None), ("changed", "v_prediction")):
        changes = {"max_steps": 1, "validation_split": None, "prediction_type": kind}
        train_ldm.main(settings(data, tiny_folder, tmp_path / name, **changes))
    plain, changed = (lines(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("plain", "changed"))
    assert plain != pytest.approx(changed, rel=1e-3)
    scheduler = LegoPipeline.from_pretrained(tmp_path / "changed" / "last").scheduler
    assert scheduler.config["prediction_type"] == "v_prediction"


@pytest.fixture(scope="module")
def trained_weights(
    data: Path, tiny_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[torch.Tensor]]:
    """All trained weights after two steps under some settings; equal settings run once."""
    runs: dict[str, list[torch.Tensor]] = {}

    def train(**changes: Any) -> list[torch.Tensor]:
        if str(changes) not in runs:
            folder = tmp_path_factory.mktemp("run")
            train_ldm.main(settings(data, tiny_folder, folder, cache=cache, **{**TWO_STEPS, **changes}))
            runs[str(changes)] = list(load_file(folder / "state" / "step-2" / "model.safetensors").values())
        return runs[str(changes)]

    return train


LORA, LOG_NORMAL = {"lora_rank": 2}, {"timestep_sampling": "log_normal"}


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {"learning_rate": 2e-3}),
        ({}, {"weight_decay": 1.0}),
        ({}, {"warmup_steps": 5}),
        ({}, {"lr_scheduler": "linear"}),
        ({}, {"max_grad_norm": 1e-8}),
        ({}, {"condition_dropout": 1 / 3}),
        ({}, {"vlm_dropout": 1.0}),
        ({}, {"box_weight": 5.0}),
        ({}, LOG_NORMAL),
        (LOG_NORMAL, {"log_sigma_mean": -2.0}),
        ({}, {"min_snr_gamma": 0.01}),
        ({}, {"noise_offset": 0.1}),
        ({}, {"seed": 1}),
        (LORA, {"lora_alpha": 6}),
    ],
    ids=lambda value: next(iter(value), ""),
)
def test_a_setting_reaches_the_weights(
    before: dict[str, Any], changes: dict[str, Any], trained_weights: Callable[..., list[torch.Tensor]]
) -> None:
    """Equal settings give equal weights to the bit, which the tests of resuming show."""
    pairs = zip(trained_weights(**before), trained_weights(**{**before, **changes}), strict=True)
    assert any(not torch.equal(first, second) for first, second in pairs)


def test_gradient_checkpointing_is_switched_on(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched = []
    switch = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda unet: (switched.append(unet), switch(unet))
    )
    for asked in (False, True):
        folder = tmp_path / str(asked)
        train_ldm.main(settings(data, tiny_folder, folder, **{**TWO_STEPS, "gradient_checkpointing": asked}))
        assert len(switched) == asked


def test_a_sample_s_loss_is_weighted_by_its_own_timestep(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With losses that stand for the sample, of which the mean has one value only if each has its own weight."""
    timesteps = []
    losses_of = train_ldm.losses_of

    def number(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        timesteps.extend(batch["timestep"].tolist())
        return 0 * losses_of(model, batch) + batch["timestep"]

    monkeypatch.setattr(train_ldm, "losses_of", number)
    changes = {**TWO_STEPS, "max_steps": 1, "min_snr_gamma": 0.01}
    train_ldm.main(settings(data, tiny_folder, tmp_path, **changes))
    weights = timestep_weights("epsilon", LegoPipeline.from_pretrained(tiny_folder).scheduler.alphas_cumprod, 0.01)
    assert len(set(weights[timesteps].tolist())) == 2
    expected = sum(timestep * float(weights[timestep]) for timestep in timesteps) / 2
    assert lines(tmp_path / "log.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_average_warms_up(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """After the second step the first weights count 1 - 2 ** -0.75, as in diffusers' training; not 2 / 11."""
    for name, changes in (("one", {"max_steps": 1}), ("two", {}), ("averaged", {"ema_decay": 0.9999})):
        train_ldm.main(settings(data, tiny_folder, tmp_path / name, **{**TWO_STEPS, "ema_decay": 0.0, **changes}))
    one, two, averaged = (
        weights(tmp_path / name / "last")["unet/diffusion_pytorch_model.safetensors:conv_in.weight"]
        for name in ("one", "two", "averaged")
    )
    decay = 1 - 2**-0.75
    assert torch.allclose(averaged - one, (1 - decay) * (two - one), atol=1e-6)
    assert (two - one).abs().max() > 1e-4


def test_half_precision_has_nearly_the_loss_of_single_precision(
    data: Path, calm_folder: Path, cache: Path, tmp_path: Path
) -> None:
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the precision of a process for good
        config = settings(data, calm_folder, tmp_path / precision, cache=cache, mixed_precision=precision, **ONE_STEP)
        train_ldm.main(config)
        losses.append(lines(tmp_path / precision / "log.jsonl")[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_several_data_sets_are_mixed_by_weight(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    second = write_pairs(tmp_path / "second", [(SIZE, SIZE)] * 5)
    config = settings(data, tiny_folder, tmp_path / "run", max_steps=2)
    train_ldm.main(replace(config, data=(data, second), data_weights=(3.0, 1.0)))
    progress = json.loads((tmp_path / "run" / "state" / "step-2" / "progress.json").read_text())
    assert progress["settings"]["samples"] == [4, 3]
    assert progress["settings"]["data_weights"] == [3.0, 1.0]


# --- Flips, sizes ---------------------------------------------------------------------------------------------------


def test_flips_double_the_pairs_and_need_embeddings_of_mirrored_frames(
    data: Path, tiny_folder: Path, cache: Path, tiny_components: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"`cache` must hold every pair, but .* lacks 4 of 8, .* mirrored; fill"):
        train_ldm.main(settings(data, tiny_folder, tmp_path / "run", cache=cache, flips=True))
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    both = write_cache(tmp_path / "cache", [data], vlm, processor, mirrored=True)
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", cache=both, flips=True, max_steps=2))
    progress = json.loads((tmp_path / "run" / "state" / "step-2" / "progress.json").read_text())
    assert progress["settings"]["samples"] == [8]


def test_frames_of_another_aspect_are_cropped_and_counted(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_pairs(tmp_path / "data", [(32, 32), (32, 32), (48, 24), (32, 32), (48, 24)])
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", max_steps=1))
    assert "1 pairs are centre-cropped to the most common aspect, 32x32 pixels" in caplog.text


def test_aspect_buckets_leave_every_pair_its_aspect(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_pairs(tmp_path / "data", [(32, 32), (32, 32), (48, 24), (48, 24), (32, 32), (48, 24)])
    shapes = set()
    losses_of = train_ldm.losses_of

    def seen(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        shapes.add(tuple(batch["noisy"].shape[-2:]))
        return losses_of(model, batch)

    monkeypatch.setattr(train_ldm, "losses_of", seen)
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", max_steps=2, aspect_buckets=True))
    assert shapes == {(8, 8), (6, 11)}
    assert "centre-cropped" not in caplog.text


# --- What is written ------------------------------------------------------------------------------------------------


def test_the_folder_of_the_lowest_validation_loss_is_best(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 1.0, 2.0])  # what training starts from is no result of it
    monkeypatch.setattr(train_ldm, "validate", lambda *args: next(losses))
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache))
    state = tmp_path / "state" / "step-4" / "progress.json"
    assert json.loads(state.read_text())["progress"] == {"best_loss": 1.0, "best_step": 2}
    best, last = weights(tmp_path / "best"), weights(tmp_path / "last")
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert "1.0000 at step 2" in (tmp_path / "best" / "README.md").read_text()


def test_best_stays_the_best_of_a_run_that_is_made_longer(
    data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 5.0, 1.0, 2.0])
    monkeypatch.setattr(train_ldm, "validate", lambda *args: next(losses))
    for max_steps in (3, 4):
        train_ldm.main(settings(data, tiny_folder, tmp_path, max_steps=max_steps))
        best = weights(tmp_path / "best")
        assert "1.0000 at step 3" in (tmp_path / "best" / "README.md").read_text()
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(tmp_path / "best").items())
    assert [line["step"] for line in lines(tmp_path / "validation.jsonl")] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 2, "lora_alpha": 6, "learning_rate": 0.1}], ids=["all weights", "lora"]
)
def test_the_validation_loss_is_that_of_the_saved_folder(
    changes: dict[str, Any], data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Computed anew: no dropout, all conditions, averaged weights, adapters scaled as in training."""
    changes = {"max_steps": 2, "learning_rate": 1e-2, "condition_dropout": 1 / 3, "vlm_dropout": 1.0, **changes}
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **changes))
    pipe, stored = quiet(tmp_path / "last"), EmbeddingCache(cache)
    alphas = pipe.scheduler.alphas_cumprod
    losses = []
    for sample, row in enumerate(read_manifest(data, "val")):
        drawn = Draws(seed=0, alphas_cumprod=alphas)(VALIDATION_STEP, sample, (6, 8, 8))
        enhancement: Any = stored.lookup(row["image_0"], row["action"])
        text = torch.zeros(1, 6, 32)
        text[0, : len(enhancement.text_embeds)] = enhancement.text_embeds[:6]
        with torch.no_grad():
            before, after = (
                pipe.vae.encode(to_model_input(row[name], SIZE, SIZE)[None]).latent_dist
                for name in ("image_0", "image_1")
            )
            condition = pipe.projector(
                pipe.encode_prompt([enhancement.description]), enhancement.image_embeds[None], text
            )
            clean = (after.mean + after.std * drawn["posterior_noise"]) * pipe.vae.config["scaling_factor"]
            alpha = alphas[drawn["timestep"]]
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * drawn["noise"]
            predicted = pipe.unet(torch.cat([noisy, before.mode()], 1), drawn["timestep"], condition).sample
        losses.append(float((predicted - drawn["noise"]).square().mean()))
    validated = lines(tmp_path / "validation.jsonl")[-1]["loss"]
    assert validated == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert validated != pytest.approx(lines(tmp_path / "validation.jsonl")[0]["loss"], rel=1e-2)


def test_two_runs_draw_the_same_pictures(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 1, "pictures_every_steps": 2, "pictures": 1}
    for name in ("one", "two"):
        train_ldm.main(settings(data, tiny_folder, tmp_path / name, cache=cache, **changes))
    one, two = (PIL.Image.open(tmp_path / name / "validation" / "step-0.png") for name in ("one", "two"))
    assert one.tobytes() == two.tobytes()


def test_pictures_are_drawn_of_fixed_validation_pairs(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {"pictures_every_steps": 2, "pictures": 2, "max_steps": 3, "report_to": "tensorboard"}
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **changes))
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-0.png", "step-2.png"]
    with PIL.Image.open(tmp_path / "validation" / "step-2.png") as sheet:
        assert sheet.width > 3 * 192
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_drawing_and_validating_leave_the_training_alone(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path / "plain", cache=cache, validation_split=None))
    changes = {"validate_every_steps": 1, "pictures_every_steps": 1, "pictures": 1}
    train_ldm.main(settings(data, tiny_folder, tmp_path / "watched", cache=cache, **changes))
    assert_equal_weights(tmp_path / "plain" / "last", tmp_path / "watched" / "last")


def test_a_trained_folder_draws_with_its_vlm(
    data: Path, tiny_folder: Path, cache: Path, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, max_steps=1))
    pipe = quiet(tmp_path / "last")
    assert pipe(frame, action="open drawer", num_inference_steps=1).images[0].size == frame.size
    assert pipe.projector.config.vlm_id == vlm_id(pipe.vlm, pipe.vlm_processor)
    linked, original = (folder / "vlm" / "model.safetensors" for folder in (tmp_path / "last", tiny_folder))
    assert linked.samefile(original)


def test_the_card_has_front_matter_and_no_paths(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    long = tmp_path / " ".join(["a long name"] * 10)  # YAML folds it over lines
    long.symlink_to(cache)
    changes = {"vlm_dropout": 0.25, "data_weights": (2.0,)}
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", cache=long, **changes))
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    assert "vlm_dropout: 0.25\n" in card
    assert "data_weights:\n- 2.0\n" in card
    assert "long name" not in card
    assert card.startswith("---\nbase_model: pipeline\n")
    for fact in ("library_name: diffusers", "| steps | 4 of 4 |", "| samples seen | 8 |", "| pairs | 4 |"):
        assert fact in card
    assert str(tmp_path) not in card
    assert str(data.parent) not in card


def test_the_share_of_waiting_for_data_is_logged(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    train_ldm.main(settings(data, tiny_folder, tmp_path, max_steps=2))
    assert all(0 <= line["waiting_for_data"] <= 1 for line in lines(tmp_path / "log.jsonl"))


def test_a_lora_loads_as_what_the_merged_folder_is(
    data: Path, tiny_folder: Path, cache: Path, frame: PIL.Image.Image, tmp_path: Path
) -> None:
    changes = {"lora_rank": 2, "lora_alpha": 6, "learning_rate": 1e-2}
    train_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **changes))
    merged = picture(quiet(tmp_path / "last"), frame)
    start = quiet(tiny_folder)
    assert not torch.allclose(picture(start, frame), merged, atol=1e-3)
    pipe = quiet(tiny_folder, projector=LegoProjector.from_pretrained(tmp_path / "lora" / "projector"))
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(picture(pipe, frame), merged, atol=1e-4)
    trained = load_file(tmp_path / "state" / "step-4" / "model.safetensors")
    assert all(".lora_" in name for name in trained if name.startswith("unet."))


# --- Refused --------------------------------------------------------------------------------------------------------


def test_pairs_that_the_cache_lacks_are_named(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    more = write_pairs(tmp_path / "more", [(SIZE, SIZE + 1)] * 3)
    with pytest.raises(ValueError, match=r"`cache` must hold every pair, but .* lacks 1 of 1, the first is"):
        train_ldm.main(settings(more, tiny_folder, tmp_path / "run", cache=cache))


def test_a_cache_of_another_vlm_of_the_same_sizes_is_refused(
    data: Path, tiny_folder: Path, tiny_components: dict[str, Any], tmp_path: Path
) -> None:
    vlm, processor = copy.deepcopy(tiny_components["vlm"]), tiny_components["vlm_processor"]
    for parameter in vlm.parameters():
        parameter.data += 0.01
    cache = write_cache(tmp_path / "cache", [data], vlm, processor)
    with pytest.raises(ValueError, match="`cache` must be filled by the VLM that is exported, .* by `--vlm`"):
        train_ldm.main(settings(data, tiny_folder, tmp_path / "run", cache=cache, **TWO_STEPS))
    for part in (vlm, processor):
        part.save_pretrained(tmp_path / "vlm")
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", cache=cache, vlm=tmp_path / "vlm", **TWO_STEPS))
    exported, own = (load_file(tmp_path / name / "model.safetensors") for name in ("run/last/vlm", "vlm"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in own.items())


def test_an_export_without_the_cache_s_vlm_is_said(
    data: Path,
    cache: Path,
    make_tiny_pipeline: Callable[..., LegoPipeline],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path / "start")
    train_ldm.main(settings(data, tmp_path / "start", tmp_path / "run", cache=cache, **TWO_STEPS))
    assert "has no VLM: to have it describe frames, pass the folder of the cache's VLM by `--vlm`" in caplog.text


def test_the_24_gb_settings_export_the_tuned_vlm() -> None:
    file = str(ROOT / "train" / "configs" / "one_24gb_gpu.yaml")
    assert parse_config(train_ldm.TrainLdmConfig, None, ["--config", file]).vlm == Path("runs/vlm/vlm")


def test_a_cache_of_another_vlm_is_refused(
    data: Path, cache: Path, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    projector = LegoProjector(vlm_dim=16, cross_attention_dim=32, num_image_tokens=4, num_heads=4)
    make_tiny_pipeline(projector=projector, vlm=None, vlm_processor=None).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="`cache` must fit the projector's {'vlm_dim': 16"):
        train_ldm.main(settings(data, tmp_path / "start", tmp_path / "run", cache=cache))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": "cache"}, "`cache` must be given"),
        ({"cache": Path("cache"), "embeddings": "none"}, "`cache` has no effect with `embeddings` none"),
        ({"vlm_parts": "text"}, "`vlm_parts` text has no effect with `embeddings` none"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"condition_dropout": 0.5}, "`condition_dropout` must be at least 0 and at most 0.33.*, got 0.5"),
        ({"ema_decay": 1.0}, "`ema_decay` must be at least 0 and below 1"),
        ({"mixed_precision": "half"}, "`mixed_precision` must be no, fp16 or bf16, got 'half'"),
        ({"pictures_every_steps": 5, "validation_split": None}, "`pictures_every_steps` needs a `validation_split`"),
        (
            {"aspect_buckets": True, "data": (Path("a"), Path("b")), "data_weights": (1.0, 2.0)},
            "must be left out with",
        ),
        ({"lora_alpha": 4}, "`lora_alpha` has no effect without `lora_rank`"),
        ({"lora_alpha": 0, "lora_rank": 2}, "`lora_alpha` must be at least 1, got 0"),
        ({"lora_rank": -1}, "`lora_rank` must be at least 0, got -1"),
        ({"data": ()}, "`data` must name at least one manifest, got none"),
        ({"data_weights": (1.0, 2.0)}, "`data_weights` must be one"),
        ({"log_every_steps": 0}, "`log_every_steps` must be at least 1, got 0"),
        ({"validation_pairs": 0}, "`validation_pairs` must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be above 0, got 0.0"),
        ({"min_snr_gamma": -1.0}, "`min_snr_gamma` must be at least 0, got -1.0"),
        ({"resolution": 0}, "`resolution` must be at least 1, got 0"),
        ({"box_weight": 0.0}, "`box_weight` must be above 0, got 0.0"),
        ({"vlm_dropout": 1.5}, "`vlm_dropout` must be at least 0 and at most 1, got 1.5"),
        ({"noise_offset": -1.0}, "`noise_offset` must be at least 0, got -1.0"),
        ({"log_sigma_mean": math.nan}, "`log_sigma_mean` must be finite, got nan"),
        ({"save_every_steps": -1}, "`save_every_steps` must be at least 0, got -1"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0, got -1"),
        ({"lr_scheduler": "cosin"}, "`lr_scheduler` must be .*, got 'cosin'"),
    ],
)
def test_settings_that_make_no_run_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, tmp_path, **changes)


def test_manifests_are_read_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no manifest"):
        train_ldm.main(settings(tmp_path / "no manifest", tmp_path / "no pipeline", tmp_path / "run"))


def test_a_run_does_not_go_on_from_other_frozen_weights(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(tiny_folder, start)
    changes = {**TWO_STEPS, "lora_rank": 2}
    train_ldm.main(settings(data, start, tmp_path / "run", cache=cache, **changes))
    kept = (tmp_path / "run" / "config.yaml").read_bytes()
    for name in ("unet", "vae"):
        file = start / name / "diffusion_pytorch_model.safetensors"
        original = file.read_bytes()
        tensors = load_file(file)
        save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"changed are weights of {name}: "):
            train_ldm.main(settings(data, start, tmp_path / "run", cache=cache, num_workers=1, **changes))
        file.write_bytes(original)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == kept  # a refused run leaves the files of the run
    train_ldm.main(settings(data, start, tmp_path / "run", cache=cache, num_workers=1, **changes))
    assert (tmp_path / "run" / "config.yaml").read_bytes() != kept


def test_a_run_does_not_go_on_with_an_edited_manifest(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", [(SIZE, SIZE)] * 4)
    train_ldm.main(settings(data, tiny_folder, tmp_path / "run", **TWO_STEPS))
    write_pairs(tmp_path / "data", [(SIZE, SIZE)] * 4, action="wave")
    with pytest.raises(ValueError, match="changed are rows: "):
        train_ldm.main(settings(data, tiny_folder, tmp_path / "run", **TWO_STEPS))


def test_the_dry_run_tells_the_memory(tiny_folder: Path, tmp_path: Path) -> None:
    assert "averaged weights" in settings(tmp_path, tiny_folder, tmp_path).report()
    assert "memory is unknown" in settings(tmp_path, tmp_path / "nowhere", tmp_path).report()


def test_the_dry_run_of_lora_without_peft_says_what_is_missing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    report = settings(tmp_path, tiny_folder, tmp_path, lora_rank=2).report()
    assert report.startswith("memory is unknown: LoRA needs peft; run")


@pytest.mark.parametrize("setting", ["ema_decay", "pictures_every_steps"])
def test_an_average_of_split_weights_is_refused(setting: str, tmp_path: Path) -> None:
    others = {"ema_decay": 0.0, "pictures_every_steps": 0}
    for kind, stage, name in (("DEEPSPEED", 3, "ZeRO-3"), ("FSDP", 0, "FSDP")):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        accelerator: Any = SimpleNamespace(distributed_type=DistributedType[kind], state=state)
        train_ldm.check_sharding(accelerator, settings(tmp_path, tmp_path, tmp_path, **others))
        value = 0.5 if setting == "ema_decay" else 5
        with pytest.raises(ValueError, match=f"`{setting}` must be 0 with {name}"):
            train_ldm.check_sharding(accelerator, settings(tmp_path, tmp_path, tmp_path, **{**others, setting: value}))


def test_zero_2_keeps_its_average(tmp_path: Path) -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    train_ldm.check_sharding(accelerator, settings(tmp_path, tmp_path, tmp_path))


# --- Processes ------------------------------------------------------------------------------------------------------


def launch(launcher: list[str], *flags: Any) -> None:
    """The script started by a launcher module in a subprocess on the CPU; its output is shown if it fails."""
    command = [sys.executable, "-m", *launcher, ROOT / "train" / "train_ldm.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def launched(data: Path, pipeline: Path, cache: Path, output_dir: Path, **changes: Any) -> list[Any]:
    flags = ["--data", data, "--pipeline", pipeline, "--cache", cache, "--output-dir", output_dir]
    for name, value in {**LAUNCHED, **changes}.items():
        flags += [f"--{name.replace('_', '-')}", value]
    return flags


@pytest.mark.slow
def test_accelerate_launch_runs_the_script(data: Path, tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    launch(
        ["accelerate.commands.launch", "--cpu"],
        *launched(data, tiny_folder, cache, tmp_path / "launched", batch_size=2),
    )
    assert report(tmp_path / "launched") == {"step": 2, "finished": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the launched process: sums of several threads round differently
    try:
        train_ldm.main(settings(data, tiny_folder, tmp_path / "here", cache=cache, **LAUNCHED))
    finally:
        torch.set_num_threads(threads)
    assert_equal_weights(tmp_path / "launched" / "last", tmp_path / "here" / "last")


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_stop_together(
    data: Path, calm_folder: Path, cache: Path, tmp_path: Path
) -> None:
    # `accelerate launch --cpu --num_processes 2` wants mpirun, and without it starts one process and says nothing.
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    changes = {"validate_every_steps": 1, "pictures_every_steps": 1, "expect_processes": 2}
    flags = launched(data, calm_folder, cache, tmp_path / "two", batch_size=2, **changes)
    launch(two, *flags, "--max-minutes", "0.00001")
    assert report(tmp_path / "two") == {"step": 1, "finished": False}
    launch(two, *flags)
    assert report(tmp_path / "two") == {"step": 2, "finished": True}
    here = {**LAUNCHED, "batch_size": 4, "validate_every_steps": 1, "save_every_steps": 1}
    train_ldm.main(settings(data, calm_folder, tmp_path / "one", cache=cache, **here))
    assert_close_gradients(tmp_path / "two", tmp_path / "one")
    losses = [[line["loss"] for line in lines(tmp_path / name / "validation.jsonl")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
