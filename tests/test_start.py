"""What training starts from; that it trains from each kind of folder is shown in tests/train."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from lego_pipeline.data.embedding_cache import Recipe
from lego_pipeline.enhance import make_recipe
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.start import load_start

RECIPE: dict[str, Any] = {
    **{key: "k" for key in ("vlm_key", "vision_key", "connector_key")},
    "family": "llava",
    "num_image_tokens": 4,
    "vlm_dim": 32,
    "question_template": "How to {}?",
    "max_new_tokens": 7,
}


def test_the_vlm_stays_on_disk_where_it_does_not_run(tiny_folder: Path) -> None:
    start = load_start(tiny_folder)
    assert start.vlm is None
    assert start.pipeline.vlm is None
    assert start.vlm_files is not None
    assert start.vlm_files.folder == tiny_folder / "vlm"
    assert load_start(tiny_folder, runs_vlm=True).vlm is not None


def test_the_pipeline_asks_as_the_cache_was_asked(tiny_folder: Path, tiny_components: dict[str, Any]) -> None:
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    recipe = make_recipe(vlm, processor, question_template="How to {}?", max_new_tokens=7)
    config = load_start(tiny_folder, recipe=recipe).pipeline.config
    assert (config["question_template"], config["max_new_tokens"]) == ("How to {}?", 7)
    config = load_start(tiny_folder, recipe=replace(recipe, descriptions="manifest")).pipeline.config
    assert (config["question_template"], config["max_new_tokens"]) == ("How to {}?", 5)


def test_a_cache_of_the_vlm_in_half_precision_is_one_of_the_vlm(
    tiny_folder: Path, tiny_components: dict[str, Any]
) -> None:
    vlm = copy.deepcopy(tiny_components["vlm"]).to(torch.float16)
    recipe = make_recipe(vlm, tiny_components["vlm_processor"])
    assert recipe.vlm_key != make_recipe(tiny_components["vlm"], tiny_components["vlm_processor"]).vlm_key
    assert load_start(tiny_folder, recipe=recipe).vlm_files is not None


def test_a_cache_of_another_vlm_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="`cache` must be filled by the VLM that is exported, .* by `--vlm`"):
        load_start(tiny_folder, recipe=Recipe(**RECIPE))


def test_a_vlm_of_another_width_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="`cache` must fit the projector's {'vlm_dim': 32, .* got {'vlm_dim': 16"):
        load_start(tiny_folder, recipe=replace(Recipe(**RECIPE), vlm_dim=16))


def test_another_prediction_goes_into_the_scheduler_that_is_saved(tiny_folder: Path, tmp_path: Path) -> None:
    load_start(tiny_folder, prediction_type="v_prediction", resolution=64).pipeline.save_pretrained(tmp_path)
    pipe = LegoPipeline.from_pretrained(tmp_path)
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.config["resolution"] == 64


def test_clean_latents_are_sampled_by_a_scheduler_that_knows_them(
    make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    make_tiny_pipeline(scheduler=EulerAncestralDiscreteScheduler()).save_pretrained(tmp_path)
    scheduler: Any = load_start(tmp_path, prediction_type="sample").pipeline.scheduler
    assert type(scheduler) is EulerDiscreteScheduler
    assert scheduler.config["prediction_type"] == "sample"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="`pipeline` must be a folder in diffusers' layout, found no model_index"
    ):
        load_start(tmp_path / "nowhere")
