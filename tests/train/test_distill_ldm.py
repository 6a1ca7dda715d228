"""distill_ldm.py at tiny size on pairs that come with the package, run in this process through its `main`.

By the training loop's clock every step of a sliced run takes a minute. Launchers and two processes are in the slow
tests.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from lego_pipeline import LegoPipeline
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.distillation import ADAPTED
from lego_pipeline.enhance import fill_cache, make_recipe
from lego_pipeline.lora import DIFFUSERS_FILE, add_lora
from lego_pipeline.memory import distillation_memory
from lego_pipeline.vlm.base import DEFAULT_QUESTION
from train import distill_ldm

ROOT = Path(__file__).parents[2]
TWO_STEPS = {"max_steps": 2, "validation_split": None}


@pytest.fixture(scope="module")
def cache(data: Path, tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all pairs, in single precision."""
    folder = tmp_path_factory.mktemp("cache")
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    recipe = make_recipe(vlm, processor, question_template=DEFAULT_QUESTION, max_new_tokens=5)
    cache, rows = EmbeddingCache(folder, dtype="float32"), read_manifest(data)
    fill_cache(vlm, processor, cache, recipe, rows["image_0"][:], rows["action"][:])
    cache.write()
    return folder


def settings(data: Path, pipeline: Path, output_dir: Path, **changes: Any) -> distill_ldm.DistillLdmConfig:
    values: dict[str, Any] = {
        "batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "teacher_steps": 5,
        "student_steps": 2,
        "lora_rank": 2,
        "validate_every_steps": 2,
        "log_every_steps": 1,
        "report_to": "none",
        "embeddings": "cache" if "cache" in changes else "none",
        **changes,
    }
    return distill_ldm.DistillLdmConfig(data=(data,), pipeline=pipeline, output_dir=output_dir, **values)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora" / DIFFUSERS_FILE)


def assert_equal_adapters(first: Path, second: Path) -> None:
    """The same tensors, bit for bit, and not all zero."""
    a, b = adapters(first), adapters(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert any(tensor.abs().sum() > 0 for name, tensor in a.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "changes",
    [
        {"vlm_dropout": 0.3, "box_weight": 3.0, "lora_alpha": 6},
        {"gradient_accumulation_steps": 2, "batch_size": 1, "ema_decay": 0.0, "gradient_checkpointing": True},
    ],
    ids=["averaged", "accumulated without an average"],
)
def test_two_slices_give_the_adapters_of_one_run(
    changes: dict[str, Any], data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, minute_clock: None
) -> None:
    distill_ldm.main(settings(data, tiny_folder, tmp_path / "whole", cache=cache, **changes))
    sliced = settings(data, tiny_folder, tmp_path / "sliced", cache=cache, max_minutes=1.5, **changes)
    distill_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 2, "finished": False}
    distill_ldm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 4, "finished": True}
    assert_equal_adapters(tmp_path / "whole", tmp_path / "sliced")
    validated = lines(tmp_path / "whole" / "validation.jsonl")
    assert [line["step"] for line in validated] == [0, 2, 4]
    assert len({line["student"] for line in validated}) == 3
    assert validated == lines(tmp_path / "sliced" / "validation.jsonl")


def test_the_adapters_alone_are_trained_and_written(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    distill_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **TWO_STEPS))
    trained = load_file(tmp_path / "state" / "step-2" / "model.safetensors")
    assert all(".lora_" in name for name in trained)
    facts = json.loads((tmp_path / "lora" / "fast.json").read_text())
    assert facts["settings"] == {"num_inference_steps": 2, **distill_ldm.ONE_PASS}
    assert facts["teacher"]["num_inference_steps"] == 5
    assert (facts["teacher"]["guidance_scale"], facts["teacher"]["image_guidance_scale"]) == (7.5, 1.5)
    assert str(tmp_path) not in (tmp_path / "lora" / "fast.json").read_text()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_validated_student_is_the_one_that_is_loaded(
    prediction_type: str,
    data: Path,
    make_tiny_pipeline: Callable[..., LegoPipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None)
    kind = type(pipe.scheduler)
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config, prediction_type=prediction_type))
    pipe.save_pretrained(tmp_path / "start")
    original, seen = distill_ldm.drawing_errors, []

    def errors(pipeline: LegoPipeline, *rest: Any) -> Any:
        found = original(pipeline, *rest)
        seen.append((pipeline.config["num_inference_steps"], found["drawn"], rest))
        return found

    monkeypatch.setattr(distill_ldm, "drawing_errors", errors)
    distill_ldm.main(settings(data, tmp_path / "start", tmp_path / "run", learning_rate=1e-2))
    assert [count for count, *_ in seen] == [5, 2, 2, 2]  # the teacher once
    pipe.load_fast(tmp_path / "run" / "lora")
    assert pipe.scheduler.config["prediction_type"] == prediction_type
    drawn, rest = seen[-1][1:]
    torch.testing.assert_close(original(pipe, *rest)["drawn"], drawn, atol=0, rtol=1e-3)  # adapters are rounded
    assert not torch.allclose(drawn, seen[1][1], rtol=4e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"image_guidance_scale": 1.0},
        {"teacher_steps": 10},
        {"box_weight": 5.0},
        {"vlm_dropout": 1.0},
        {"ema_decay": 0.0},
        {"lora_alpha": 6},
        {"seed": 1},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_setting_reaches_the_adapters(
    changes: dict[str, Any], data: Path, tiny_folder: Path, cache: Path, tmp_path: Path, plain_run: Path
) -> None:
    distill_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **{**TWO_STEPS, **changes}))
    before, after = adapters(plain_run), adapters(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def plain_run(data: Path, tiny_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    distill_ldm.main(settings(data, tiny_folder, folder, cache=cache, **TWO_STEPS))
    return folder


def test_half_precision_without_an_average_trains_all_adapters(
    data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    changes = {"mixed_precision": "bf16", "ema_decay": 0.0, **TWO_STEPS}
    distill_ldm.main(settings(data, tiny_folder, tmp_path, cache=cache, **changes))
    assert all(tensor.abs().sum() > 0 for name, tensor in adapters(tmp_path).items() if "lora_B" in name)


# --- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": "cache"}, "`cache` must be given with `embeddings` cache and left out with none"),
        ({"cache": Path("cache"), "embeddings": "none"}, "`cache` must be given with `embeddings` cache and left out"),
        ({"student_steps": 6}, "`student_steps` must be at least 1 and at most 5, got 6"),
        ({"teacher_steps": 0}, "`teacher_steps` must be at least 1 and at most 1000, got 0"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0, got -1.0"),
        ({"lora_rank": 0}, "`lora_rank` must be at least 1, got 0"),
        ({"ema_decay": 1.0}, "`ema_decay` must be at least 0 and below 1, got 1.0"),
        ({"box_weight": 0.0}, "`box_weight` must be above 0, got 0.0"),
        ({"vlm_dropout": 2.0}, "`vlm_dropout` must be at least 0 and at most 1, got 2.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_run_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, tmp_path, **changes)


def test_a_run_does_not_go_on_from_another_teacher(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(tiny_folder, start)
    distill_ldm.main(settings(data, start, tmp_path / "run", **TWO_STEPS))
    with pytest.raises(ValueError, match="changed are guidance_scale: 7.5 -> 2.0"):
        distill_ldm.main(settings(data, start, tmp_path / "run", guidance_scale=2.0, **TWO_STEPS))
    file = start / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="changed are weights of unet: "):
        distill_ldm.main(settings(data, start, tmp_path / "run", **TWO_STEPS))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_split_over_processes_are_refused(kind: str) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(ValueError, match=f"plain data parallelism, got {kind}"):
        distill_ldm.check_sharding(accelerator)


def test_the_dry_run_tells_the_memory(tiny_folder: Path, tmp_path: Path) -> None:
    table = settings(tmp_path, tiny_folder, tmp_path).report()
    assert "averaged weights" in table
    assert "at most in use" in table
    assert "memory is unknown" in settings(tmp_path, tmp_path / "nowhere", tmp_path).report()


def test_the_computed_memory_has_the_weights_that_teacher_and_student_share_once(
    tiny_folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline]
) -> None:
    parts = distillation_memory(tiny_folder, batch_size=2, lora_rank=2).parts
    pipe = make_tiny_pipeline()
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.projector)
    frozen = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
    assert parts["frozen"] == frozen
    add_lora(pipe.unet, 2, 2, targets=ADAPTED)
    trained = sum(parameter.nbytes for parameter in pipe.unet.parameters() if parameter.requires_grad)
    assert parts["weights"] == parts["average"] == trained


# --- Processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_distil_what_one_does(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    flags: list[Any] = ["--data", data, "--pipeline", tiny_folder, "--embeddings", "none", "--teacher-steps", "5"]
    flags += ["--student-steps", "2", "--lora-rank", "2", "--max-steps", "2", "--learning-rate", "1e-3"]
    flags += ["--warmup-steps", "0", "--log-every-steps", "1", "--validate-every-steps", "1", "--report-to", "none"]
    flags += ["--batch-size", "2", "--expect-processes", "2", "--output-dir", tmp_path / "two"]
    command: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train" / "distill_ldm.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    changes = {"max_steps": 2, "validate_every_steps": 1}
    distill_ldm.main(settings(data, tiny_folder, tmp_path / "one", batch_size=4, **changes))
    for first, second in zip(*(lines(tmp_path / name / "log.jsonl") for name in ("one", "two")), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    one, two = (lines(tmp_path / name / "validation.jsonl") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first["teacher"] == pytest.approx(second["teacher"], rel=1e-4)
        assert first["student"] == pytest.approx(second["student"], rel=1e-3)
    assert report(tmp_path / "two") == {"step": 2, "finished": True}
