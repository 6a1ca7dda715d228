"""The benchmarks: the comparison and the savings on the tiny pipeline, and the whole inference script (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import inference
from examples.kitchen.frames import load_frames, psnr, to_unit
from lego_pipeline.data.manifest import read_manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def request_of_both(tiny_pipeline, make_frame) -> inference.Request:
    return inference.make_request(tiny_pipeline, make_frame(48, 40), "The hand pulls the drawer.")


def test_a_request_has_the_models_size_so_that_neither_pipeline_resizes(request_of_both):
    assert request_of_both.frame.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("scales", [(7.5, 1.5), (7.5, 1.0)])
def test_both_pipelines_give_the_same_images(request_of_both, scales):
    comparison = inference.compare(request_of_both, steps=3, repeats=1, scales=scales)
    assert comparison["image_deviation"] > 0.01  # not one grey for both
    assert comparison["max_difference"] <= inference.LARGEST_DIFFERENCE


def test_the_arithmetic_of_a_saving_is_the_share_of_passes(request_of_both):
    rows = inference.savings(request_of_both, steps=4, repeats=1)
    reuse, two_passes, one_pass, interval = (row["arithmetic"] for row in rows)
    assert reuse > 1
    assert two_passes == pytest.approx(3 / 2, rel=1e-3)
    assert one_pass == pytest.approx(3, rel=1e-3)
    assert interval == pytest.approx(3 / 2, rel=0.2)  # keys and values are computed for three passes in both
    assert rows[0]["max_difference"] == 0


def test_reuse_is_switched_off_for_the_block_only(tiny_pipeline):
    before = tiny_pipeline.unet.attn_processors
    with inference.without_reuse(tiny_pipeline.unet):
        within = tiny_pipeline.unet.attn_processors.values()
        assert {type(processor) for processor in within} == {inference.PlainAttnProcessor}
    assert tiny_pipeline.unet.attn_processors == before


def test_calls_are_measured_in_turn_after_one_run_each():
    order = []
    times = inference.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert [len(seconds.wall) for seconds in times.values()] == [2, 2]


def test_a_ratio_is_the_median_of_its_pairs():
    assert inference.ratios([2, 9, 4], [1, 3, 4]) == {"median": 2, "low": 1, "high": 3}


@pytest.mark.filterwarnings("ignore:The result is enlarged from 32x32")
@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_quality_is_measured_over_the_frame_and_inside_the_boxes(tiny_folder):
    quality = inference.interval_quality(tiny_folder, pairs=2, steps=2, device="cpu")
    rows = read_manifest(inference.FRAMES).select([0, 1])
    before, truth = to_unit(load_frames(rows)).unbind(1)
    assert quality["input, copied"]["frame"] == pytest.approx(psnr(before, truth).mean().item())
    assert quality["input, copied"]["boxes"] < quality["input, copied"]["frame"]  # what changes is in the boxes
    assert list(quality) == ["input, copied", "guidance in all steps", "guidance in (0, 0.5)"]


def test_a_saving_by_reuse_over_few_steps_says_so():
    reuse, passes = {"saving": "reuse", "max_difference": 0.0}, {"saving": "two passes"}
    assert inference._few_steps(reuse, 2) == " (over 2 steps only; more gain more)"
    assert inference._few_steps(reuse, 10) == inference._few_steps(passes, 2) == ""


def test_settings_out_of_range_name_themselves():
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        inference.InferenceConfig(repeats=0)


@pytest.mark.slow
def test_the_inference_benchmark_reports_its_bars(tmp_path):
    path = tmp_path / "inference.json"
    arguments = ["--steps", "10", "--repeats", "5", "--threads", "1", "--device", "cpu"]
    arguments += ["--quality-pairs", "0", "--json", path]
    command = [sys.executable, "benchmarks/inference.py", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bars = json.loads(path.read_text())["unets"][0]["bars"]
    assert bars["max_difference"]["held"]
    assert bars["memory_ratio"]["held"]
    # The bar is 1.0, by the wall clock, on a quiet machine; the README has its numbers. A test runs on any machine,
    # beside anything, so processor time counts here, with room for its noise.
    assert bars["speed_ratio"]["by_processor_time"] >= 0.9
    assert "| UNet, steps | saving | speed | processor time | arithmetic |" in done.stdout
