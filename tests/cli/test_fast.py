"""`--fast` of `lego generate` and `lego demo`: the few-step adapters in a model's folder are what is drawn with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FAST
from lego_pipeline.cli import main
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.records import PNG_KEY
from lego_pipeline.distillation import ADAPTED, student_scheduler
from lego_pipeline.fast import save_fast
from lego_pipeline.lora import add_lora

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "guidance_interval": [0, 1]}


@pytest.fixture(scope="module")
def fast_folder(
    tiny_folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The saved tiny pipeline with a few-step model in it."""
    folder = tmp_path_factory.mktemp("fast") / "pipeline"
    shutil.copytree(tiny_folder, folder)
    pipe = make_tiny_pipeline()
    add_lora(pipe.unet, 2, 2, targets=ADAPTED)
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.1)
    facts = {"settings": SETTINGS}
    save_fast(folder / FAST, pipe.unet.state_dict(), 2, student_scheduler(pipe.scheduler, 10), facts)
    return folder


@pytest.fixture
def frame_file(frame: PIL.Image.Image, tmp_path: Path) -> Path:
    frame.save(tmp_path / "frame.png")
    return tmp_path / "frame.png"


def record_of(path: Path) -> dict:
    with PIL.Image.open(path) as picture:
        return json.loads(picture.info[PNG_KEY])


def test_fast_draws_another_picture_in_few_unguided_steps(fast_folder: Path, frame_file: Path, tmp_path: Path) -> None:
    argv = ["generate", "--model", str(fast_folder), "--image", str(frame_file), "--description", "open it"]
    records = {}
    for name, flags in {"fast": ["--fast"], "slow": []}.items():
        assert main([*argv, *flags, "--output", str(tmp_path / f"{name}.png")]) == 0
        records[name] = record_of(tmp_path / f"{name}.png")
    shown = [
        (record["steps"], record["guidance_scale"], record["image_guidance_scale"]) for record in records.values()
    ]
    assert shown == [(2, 1.0, 1.0), (3, 7.5, 1.5)]
    assert PIL.Image.open(tmp_path / "fast.png").tobytes() != PIL.Image.open(tmp_path / "slow.png").tobytes()


def test_a_picture_without_fast_is_not_taken_for_one_with_it(
    fast_folder: Path, frame_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(fast_folder), "--image", str(frame_file), "--action", "cut", "--steps", "1"]
    argv += ["--output", str(tmp_path / "out"), "--json"]
    written = []
    for flags in ([], ["--fast"], ["--fast"]):
        assert main([*argv, *flags]) == 0
        written.append(json.loads(capsys.readouterr().out)["written"])
    assert written == [1, 1, 0]


def test_a_model_without_few_step_adapters_is_named(
    tiny_folder: Path, frame_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_folder), "--image", str(frame_file), "--action", "cut", "--fast"]
    assert main([*argv, "--output", str(tmp_path / "out.png")]) == 2
    assert f"`--fast` needs few-step adapters, but there are none at {tiny_folder / FAST}" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_fast_wants_a_folder(frame_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", "owner/name", "--image", str(frame_file), "--action", "cut", "--steps", "1"]
    assert main([*argv, "--fast", "--output", str(tmp_path / "out.png")]) == 2
    assert "`--fast` needs a model folder of this machine, got owner/name" in capsys.readouterr().err


def test_more_steps_than_the_teacher_had_are_refused(
    fast_folder: Path, frame_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(fast_folder), "--image", str(frame_file), "--action", "cut", "--fast"]
    assert main([*argv, "--steps", "11", "--output", str(tmp_path / "out.png")]) == 2
    assert "`--steps` must be at most 10 with `--fast`, got 11" in capsys.readouterr().err


def test_few_step_adapters_change_nothing_for_pictures_without_them(fast_folder: Path, tiny_folder: Path) -> None:
    def print_of(folder: Path, *, fast: bool) -> str:
        return Generate(output=Path("out"), model=str(folder), fast=fast).fingerprint()

    assert print_of(fast_folder, fast=False) == print_of(tiny_folder, fast=False)
    assert print_of(fast_folder, fast=True) != print_of(tiny_folder, fast=True)
    assert print_of(tiny_folder, fast=True) == print_of(tiny_folder, fast=False)


@pytest.mark.parametrize("flag", ["--guidance-scale", "--image-guidance-scale"])
def test_scales_beside_fast_are_refused(
    flag: str, frame_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--image", str(frame_file), "--action", "cut", "--output", str(tmp_path / "out.png"), "--fast"]
    assert main([*argv, flag, "2.0"]) == 2
    assert f"`{flag}` must be left out with `--fast`, got 2.0" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused(scale: float, tmp_path: Path) -> None:
    options = Generate(output=tmp_path / "out.png")
    with pytest.raises(ValueError, match="`--image-guidance-scale` must be a finite number of at least 0"):
        options.check_scales(None, scale)
    options.check_scales(None, 0.0)
