"""The benchmarks: the comparison and the savings on the tiny pipeline, and the whole inference script (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import cache, inference, training
from examples.kitchen.frames import load_frames, psnr, to_unit
from lego_pipeline.data.manifest import read_manifest, write_shard

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


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_the_cache_benchmark_orders_the_precisions(tiny_folder, tmp_path, capsys):
    path = tmp_path / "new" / "cache.json"
    report = cache.main(cache.CacheConfig(model=tiny_folder, pairs=3, json=path))
    assert json.loads(path.read_text())["pairs"] == report["pairs"] == 3
    bytes_of_a_frame = {row["dtype"]: row["first"] for row in report["sizes"] if row["name"] == "released sizes"}
    assert bytes_of_a_frame["int8"] < bytes_of_a_frame["float16"] < bytes_of_a_frame["float32"]
    for part in cache.PARTS:
        half, int8 = (max(report["errors"][name][part]) for name in ("float16", "int8"))
        assert 0 < half < int8 < 0.05
    assert min(report["errors"]["another action"]["text part"]) > 0.05
    assert "| released sizes | int8 |" in capsys.readouterr().out


@pytest.fixture
def four_pairs(tmp_path):
    """A manifest of four of the embedded pairs."""
    write_shard(
        [dict(row) for row in read_manifest(inference.FRAMES).select(range(4))], tmp_path / "data" / "0.parquet"
    )
    yield tmp_path / "data"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_of_the_example_trains_its_own_unet_and_average(tiny_pipeline, four_pairs):
    rows = read_manifest(four_pairs)
    example = training.Example(tiny_pipeline, rows, training.TrainingConfig(batch_size=2))
    before = [parameter.clone() for parameter in tiny_pipeline.unet.parameters()]
    for _ in range(3):  # into a second epoch
        example.step()
    after = list(example.unet.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_pipeline.unet.parameters(), strict=True))
    assert sum(torch.equal(a, b) for a, b in zip(before, after, strict=True)) < 0.1 * len(before)
    assert not any(torch.equal(a, b) for a, b in zip(example.average.shadow_params, before, strict=True) if a.ndim > 1)
    assert example.bar.n == 3


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_the_training_benchmark_runs_the_script_and_the_example_in_turn(
    tiny_folder, four_pairs, tmp_path, monkeypatch, capsys
):
    order = []
    original, losses_of = training.Example.step, training.train_ldm.losses_of
    monkeypatch.setattr(training.Example, "step", lambda self: (order.append("example"), original(self)))
    monkeypatch.setattr(training.train_ldm, "losses_of", lambda *args: (order.append("own"), losses_of(*args))[1])
    path = tmp_path / "new" / "training.json"
    config = training.TrainingConfig(model=tiny_folder, data=four_pairs, batch_size=2, rounds=2, json=path)
    report = training.main(config)
    assert order == ["own", "example"] * 2 * (training.WARM_UP + 2)
    results = json.loads(path.read_text())["results"]
    assert [result["way"] for result in results] == ["on the fly", "computed once"]
    assert all(result["samples_per_second"]["train_ldm"] > 0 for result in results)
    assert all(0 < result["waiting_for_data"] < 1 for result in results)
    printed = capsys.readouterr().out
    assert printed.count("held") + printed.count("MISSED") == len(report["bars"]) == 4
    assert training.train_ldm.ResumableSteps is training.ResumableSteps


def test_a_bar_is_held_at_its_limit_and_missed_below():
    def result(way: str, ratio: float, wait: float) -> dict:
        both = {clock: {"median": ratio} for clock in ("wall", "processor")}
        return {"way": way, "ratio": both, "waiting_for_data": wait}

    bars = training.bars([result("on the fly", 1.0, 0.06), result("computed once", 1.29, 0.05)])
    assert [bar["held"] for bar in bars.values()] == [True, False, False, True]


@pytest.mark.slow
def test_the_training_benchmark_holds_its_bars(tmp_path):
    path = tmp_path / "training.json"
    command = [sys.executable, "benchmarks/training.py", "--rounds", "5", "--threads", "1", "--json", str(path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    bars = json.loads(path.read_text())["bars"]
    # By processor time and with room for its noise, as below.
    assert bars["speed, on the fly"]["by_processor_time"] >= 0.9
    assert bars["speed, computed once"]["by_processor_time"] >= 1.2
    assert bars["waiting for data, on the fly"]["held"]
    assert bars["waiting for data, computed once"]["held"]


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
