"""The kitchen's chain of stages: it ends where the time is over, goes on from there, and writes whole folders only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from examples.kitchen import ablations, report, train
from examples.kitchen.ablations import AblationsConfig
from examples.kitchen.train import Chain, OutOfTime, TrainKitchenConfig, frame_statistics
from lego_pipeline import LegoPipeline
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.enhance import fill_cache, make_recipe
from lego_pipeline.vlm import llava

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The chain's clock, `now` in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_stage_is_called_until_its_report_says_finished(tmp_path, monkeypatch):
    calls = []

    def run(command, timeout):
        calls.append(command)
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / "report.json").write_text(json.dumps({"finished": len(calls) == 3}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):  # the second time there is nothing left to do
        Chain(tmp_path, seed=4).train("vae", "script.py", "--max-steps", "9")
    options = ["--output-dir", str(tmp_path / "vae"), "--max-minutes", "0.00", "--seed", "4"]
    assert calls == [[sys.executable, "script.py", "--max-steps", "9", *options]] * 3


def test_no_limit_leaves_no_end(tmp_path, clock):
    stages = Chain(tmp_path)
    clock.now = 1e9
    assert stages.minutes_left() == 0


def test_the_minutes_run_out(tmp_path, clock):
    stages = Chain(tmp_path, max_minutes=3)
    clock.now = 60.0
    assert stages.minutes_left() == 2
    clock.now = 179.0
    with pytest.raises(OutOfTime):
        stages.minutes_left()


def test_a_command_that_outlasts_the_slice_ends_as_out_of_time(tmp_path, clock, monkeypatch):
    def run(command, timeout):
        assert timeout == 60 * (5 + 1)  # a minute more than there is, for scripts that end by themselves
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OutOfTime):
        Chain(tmp_path, max_minutes=5).call("slow.py")


def test_a_failing_command_ends_the_chain_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, timeout: SimpleNamespace(returncode=7))
    with pytest.raises(SystemExit) as error:
        Chain(tmp_path).call("broken.py")
    assert error.value.code == 7


def test_the_end_of_the_slice_is_said_and_is_no_failure(tmp_path, clock, monkeypatch, capsys):
    def run(command, timeout):
        clock.now += 90
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    train.main(TrainKitchenConfig(run_dir=tmp_path, max_minutes=2))
    assert "2 minutes are over; the same command goes on from here" in capsys.readouterr().out


def test_frame_statistics_are_those_of_the_training_frames(tmp_path, tiny_components, make_frame):
    vlm, processor = tiny_components["vlm"], tiny_components["vlm_processor"]
    frames = [make_frame(32, 32, seed) for seed in range(41)]  # the last one is not of the training split
    cache = EmbeddingCache(tmp_path, dtype="float32")
    fill_cache(vlm, processor, cache, make_recipe(vlm, processor, max_new_tokens=1), frames, ["open drawer"] * 41)
    cache.write()
    with torch.no_grad():
        states = torch.stack(llava.frame_states(vlm, processor, frames[:40]))
        pooled = llava.image_embeds(llava.connector(vlm), states, 32).mean(1)
    statistics = frame_statistics(tmp_path, Dataset.from_dict({"image_0": [*frames[:40], frames[0]]}))
    along = pooled @ torch.tensor(statistics["directions"]).T
    torch.testing.assert_close(torch.tensor(statistics["mean"]), along.mean(0), atol=1e-3, rtol=0)
    scale = along.std(0).clamp_min(1e-4)
    torch.testing.assert_close(torch.tensor(statistics["scale"]), scale, atol=1e-3, rtol=0)
    distances = ((along - along.mean(0)) / scale).square().mean(1)
    assert statistics["limit"] == pytest.approx(1.5 * distances.max().item(), abs=0.05)


def test_rows_of_the_table_are_trained_alike_and_take_part_when_they_are_finished(tmp_path, monkeypatch):
    calls = []

    def run(command, timeout):
        calls.append(command)
        folder = Path(command[command.index("--output-dir") + 1])
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"finished": folder.name != "both"}))
        return SimpleNamespace(returncode=int(folder.name == "both"))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit):  # of the last row
        ablations.main(AblationsConfig(run_dir=tmp_path, ldm_steps=7, small_steps=3, seed=4))
    steps = [command[command.index("--max-steps") + 1] for command in calls]
    assert steps == ["7", "3", "3", "3", "3", "3"]
    assert all(command[command.index("--seed") + 1] == "4" for command in calls)
    assert all(command[command.index("--pipeline") + 1] == str(tmp_path / "start") for command in calls)
    assert [command[-7] for command in calls[1:4]] == ["none", "image", "text"]
    systems, missing = report.systems_of(tmp_path, Path("model"))
    assert missing == ["both"]
    assert systems[:2] == [
        f"label only={tmp_path}/ablations/label_only/last:label",
        f"description, small budget={tmp_path}/ablations/description/last:description",
    ]
    assert systems[-1] == "LEGO=model"


@pytest.mark.slow
def test_a_killed_chain_goes_on_to_a_checkpoint_that_is_evaluated_and_described(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run, results = tmp_path / "run", tmp_path / "results"
    steps = [word for stage in ("vae", "clip", "vlm", "ldm", "fast") for word in (f"--{stage}-steps", "2")]
    pairs = ("--pairs", "8", "--validation-pairs", "4", "--test-pairs", "4")
    command = [sys.executable, "-m", "examples.kitchen.train", "--run-dir", str(run), *pairs, *steps]

    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    time.sleep(20)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # the chain and the stage that it is in
    process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)

    model = run / "ldm" / "last"
    assert LegoPipeline.from_pretrained(model).config.frame_statistics["limit"] > 0
    train.export(run, tmp_path / "exported")
    exported = LegoPipeline.from_pretrained(tmp_path / "exported").load_fast(tmp_path / "exported")
    assert (exported.config["num_inference_steps"], exported.config["guidance_scale"]) == (4, 1.0)
    report = (
        *("--run-dir", run, "--model", tmp_path / "exported", "--output-dir", results),
        *("--pairs", "4", "--tuning-pairs", "2", "--few-steps-pairs", "2"),
    )
    words = [sys.executable, "-m", "examples.kitchen.report", *map(str, report)]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)
    logs = {f"{stage}_log.jsonl" for stage in ("vae", "clip", "vlm", "ldm")}
    tables = {f"{name}.{end}" for name in ("table", "descriptions", "few_steps") for end in ("json", "md")}
    pictures = {"contact_sheet.jpg", "loss_curves.png", "few_steps.png", "descriptions", "evaluation"}
    assert {path.name for path in results.iterdir()} == {"ldm_validation.jsonl", *pictures, *tables, *logs}
    card = (tmp_path / "exported" / "README.md").read_text()
    assert (results / "table.md").read_text() in card
    assert (results / "descriptions.md").read_text() in card
    assert "label only" not in (results / "table.md").read_text()  # no such row was trained
