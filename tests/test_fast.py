"""Few-step models: what is saved is loaded with and without peft, and what doesn't fit is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers.pipelines import pipeline_loading_utils
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from safetensors.torch import load_file

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FAST
from lego_pipeline.distillation import ADAPTED, student_scheduler
from lego_pipeline.fast import FACTS, save_fast
from lego_pipeline.lora import DIFFUSERS_FILE, add_lora

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "guidance_interval": [0, 1]}
RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def folder(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few-step model of the tiny pipeline whose adapters do something."""
    pipe = make_tiny_pipeline()
    add_lora(pipe.unet, RANK, ALPHA, targets=ADAPTED)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("few") / "lora"
    save_fast(folder, pipe.unet.state_dict(), ALPHA, student_scheduler(pipe.scheduler, 10), {"settings": SETTINGS})
    return folder


def picture(pipe: LegoPipeline, frame: PIL.Image.Image, **settings: Any) -> torch.Tensor:
    """By the pipeline's own settings, (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    images: Any = pipe(frame, description="open it", output_type="pt", generator=generator, **settings).images
    return images


def test_a_few_step_model_draws_as_its_adapters_and_scheduler_do(
    folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline], frame: PIL.Image.Image
) -> None:
    pipe = make_tiny_pipeline().load_fast(folder)
    by_hand = make_tiny_pipeline()
    by_hand.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    by_hand.register_modules(scheduler=LCMScheduler.from_pretrained(folder))
    slow = make_tiny_pipeline(scheduler=by_hand.scheduler)
    assert not torch.allclose(picture(slow, frame, **SETTINGS), picture(by_hand, frame, **SETTINGS), atol=1e-2)
    torch.testing.assert_close(picture(pipe, frame), picture(by_hand, frame, **SETTINGS), atol=1e-4, rtol=0)


def test_a_default_call_is_one_pass_a_step(
    folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline], frame: PIL.Image.Image
) -> None:
    pipe = make_tiny_pipeline().load_fast(folder)
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: batches.append(len(inputs[0])))
    picture(pipe, frame)
    assert batches == [1, 1]
    assert pipe.config["guidance_interval"] == [0, 1]


def test_it_loads_from_a_pipeline_folder_and_without_peft(
    folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / FAST).symlink_to(folder)
    pipe = LegoPipeline.from_pretrained(tiny_folder, vlm=None, vlm_processor=None)
    with monkeypatch.context() as without:
        without.setattr(pipeline_loading_utils, "is_peft_available", lambda: False)
        without.setitem(sys.modules, "peft", None)
        pipe.load_fast(tmp_path / "pipeline")
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.save_pretrained(tmp_path / "saved")  # a pipeline of its own, in few steps
    again = LegoPipeline.from_pretrained(tmp_path / "saved")
    assert again.config["num_inference_steps"] == 2
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True))


def test_every_layer_has_an_adapter_in_half_precision(
    folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline]
) -> None:
    layers = {
        name
        for name, module in make_tiny_pipeline().unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    stored = load_file(folder / DIFFUSERS_FILE)
    assert {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in stored} == layers
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_a_pipeline_that_is_a_few_step_one_already_is_refused(folder: Path, tiny_pipeline: LegoPipeline) -> None:
    tiny_pipeline.load_fast(folder)
    with pytest.raises(ValueError, match="`pipeline` must not be a few-step one already"):
        tiny_pipeline.load_fast(folder)


def test_a_pipeline_with_adapters_is_refused(folder: Path, tiny_pipeline: LegoPipeline) -> None:
    add_lora(tiny_pipeline.unet, RANK, ALPHA)
    with pytest.raises(ValueError, match="`pipeline` must have plain weights, got adapters"):
        tiny_pipeline.load_fast(folder)


def test_a_folder_without_a_few_step_model_is_refused(tiny_pipeline: LegoPipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`folder` must hold a few-step model, found no fast.json"):
        tiny_pipeline.load_fast(tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        "another UNet",
        "cut off",
        "no settings",
        "a list of settings",
        "no adapters",
        "no scheduler",
        "broken scheduler",
    ],
)
def test_what_does_not_fit_leaves_the_pipeline_as_it_was(
    broken: str, folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    pipe = make_tiny_pipeline()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    adapters, facts = tmp_path / DIFFUSERS_FILE, tmp_path / FACTS
    match broken:
        case "another UNet":
            settings = {**pipe.unet.config, "block_out_channels": (16, 16)}
            pipe.register_modules(unet=type(pipe.unet).from_config(settings))
        case "cut off":
            adapters.write_bytes(adapters.read_bytes()[:-10])
        case "no settings":
            facts.write_text(json.dumps({}))
        case "a list of settings":
            facts.write_text(json.dumps({"settings": list(SETTINGS)}))
        case "no adapters":
            adapters.unlink()
        case "no scheduler":
            (tmp_path / "scheduler_config.json").unlink()
        case "broken scheduler":
            (tmp_path / "scheduler_config.json").write_text("{")
    before, scheduler = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}, pipe.scheduler
    with pytest.raises(ValueError, match="`folder` must hold a few-step model of this UNet"):
        pipe.load_fast(tmp_path)
    assert pipe.scheduler is scheduler
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
