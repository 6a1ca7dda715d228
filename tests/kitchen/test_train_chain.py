"""The kitchen's chain of stages: it ends where the time is over, goes on from there, and writes whole folders only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from examples.kitchen import train
from examples.kitchen.train import Chain, OutOfTime, TrainKitchenConfig, frame_statistics, whole_folder
from lego_pipeline import LegoPipeline
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.vlm.base import Enhancement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The chain's clock, `now` in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def chain(folder: Path, **settings) -> Chain:
    return Chain(TrainKitchenConfig(run_dir=folder, **settings))


def test_a_stage_is_called_until_its_report_says_finished(tmp_path, monkeypatch):
    calls = []

    def run(command, timeout):
        calls.append(command)
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / "report.json").write_text(json.dumps({"finished": len(calls) == 3}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):  # the second time there is nothing left to do
        chain(tmp_path, seed=4).train("vae", "script.py", "--max-steps", "9")
    options = ["--output-dir", str(tmp_path / "vae"), "--max-minutes", "0.00", "--seed", "4"]
    assert calls == [[sys.executable, "script.py", "--max-steps", "9", *options]] * 3


def test_no_limit_leaves_no_end(tmp_path, clock):
    stages = chain(tmp_path)
    clock.now = 1e9
    assert stages.minutes_left() == 0


def test_the_minutes_run_out(tmp_path, clock):
    stages = chain(tmp_path, max_minutes=3)
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
        chain(tmp_path, max_minutes=5).call("slow.py")


def test_a_failing_command_ends_the_chain_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, timeout: SimpleNamespace(returncode=7))
    with pytest.raises(SystemExit) as error:
        chain(tmp_path).call("broken.py")
    assert error.value.code == 7


def test_the_end_of_the_slice_is_said_and_is_no_failure(tmp_path, clock, monkeypatch, capsys):
    def run(command, timeout):
        clock.now += 90
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    train.main(TrainKitchenConfig(run_dir=tmp_path, max_minutes=2))
    assert "2 minutes are over; the same command goes on from here" in capsys.readouterr().out


def test_a_folder_whose_writing_fails_is_not_there(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "start") as folder:
        (folder / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_replacement_fails_stays(tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "old").touch()
    with pytest.raises(KeyError), whole_folder(tmp_path / "start"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["start", "old"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        (tmp_path / "start.unfinished").mkdir()  # left by a kill
        with whole_folder(tmp_path / "start") as folder:
            (folder / name).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["start", "new"]


def test_frame_statistics_are_those_of_the_training_frames(tmp_path):
    frames = {f"f{i}": torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).half() for i in range(5)}
    cache = EmbeddingCache(tmp_path)
    for name, image_embeds in frames.items():
        cache.add(name, f"{name}-text", Enhancement("I open it.", image_embeds, torch.zeros(2, 3)))
    cache.write()
    for split, keys in {"train": ["f0", "f1", "f2", "f3", "f0"], "val": ["f4"]}.items():
        table = pa.table({"id": keys, "frame_key": keys, "text_key": [f"{key}-text" for key in keys]})
        pq.write_table(table, tmp_path / f"pairs-{split}-0.pairs")
    pooled = torch.stack([frames[f"f{i}"].float().mean(0) for i in range(4)])
    statistics = frame_statistics(tmp_path)
    along = pooled @ torch.tensor(statistics["directions"]).T
    torch.testing.assert_close(torch.tensor(statistics["mean"]), along.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(statistics["scale"]), along.std(0), atol=1e-3, rtol=0)
    distances = ((along - along.mean(0)) / along.std(0)).square().mean(1)
    assert statistics["limit"] == pytest.approx(1.5 * distances.max().item(), abs=0.05)


@pytest.mark.slow
def test_a_killed_chain_goes_on_to_a_checkpoint_that_is_evaluated_and_described(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run, results = tmp_path / "run", tmp_path / "results"
    steps = [word for stage in ("vae", "clip", "vlm", "ldm") for word in (f"--{stage}-steps", "2")]
    pairs = ("--pairs", "8", "--validation-pairs", "4", "--test-pairs", "4")
    command = [sys.executable, "-m", "examples.kitchen.train", "--run-dir", str(run), *pairs, *steps]

    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    time.sleep(20)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # the chain and the stage that it is in
    process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)

    model = run / "ldm" / "pipeline"
    assert LegoPipeline.from_pretrained(model).config.frame_statistics["limit"] > 0
    for module, *arguments in (
        ("evaluate", "--data", run / "data" / "test", "--model", model, "--output-dir", results, "--pairs", "4",
         "--sheet", "2", "--batch-size", "2"),
        ("card", "--run-dir", run, "--model", model, "--results", results / "results.json", "--pictures", results),
    ):  # fmt: skip
        words = [sys.executable, "-m", f"examples.kitchen.{module}", *map(str, arguments)]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
    names = {"results.json", "contact_sheet.jpg", "loss_curves.png", "ldm_validation.jsonl"}
    assert {path.name for path in results.iterdir()} == names  # no log.jsonl: two steps are no logging interval
    assert "On " in (model / "README.md").read_text()
