"""Killed at random moments and started anew, again and again: bit for bit the weights of a run that nobody disturbed.

The scripts run as processes of their own, one and two of them, with a state after every step, so that many kills fall
into saving; others fall into loading, between steps, into validation, or before the last start got anywhere.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
KILLS = 20
STEPS = 80

pytestmark = pytest.mark.slow


class Server:
    """Process of `fork_server.py`."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, script: str, arguments: list[Any], **job: Any) -> dict[str, Any]:
        """Starts a script, see `fork_server.py`; what it writes is in `said` then."""
        assert self.process.stdin is not None
        self.log.unlink(missing_ok=True)
        values = {"processes": 1, "kill": None, "file_size": None, **job}
        values |= {"script": script, "arguments": [*map(str, arguments)], "log": str(self.log)}
        print(json.dumps(values), file=self.process.stdin, flush=True)
        return self.answer()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def finish(self, script: str, arguments: list[Any], **job: Any) -> None:
        """Runs a script to its end."""
        result = self.run(script, arguments, **job)
        assert set(result["exit_codes"]) == {0}, self.said[-4000:]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.process.stdin is not None and server.process.stdout is not None
    server.process.stdin.close()
    server.process.wait(20)
    server.process.stdout.close()


@pytest.fixture(scope="module")
def cache(data: Path, vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all pairs."""
    from train import cache_embeddings

    folder = tmp_path_factory.mktemp("cache")
    options = {"split": ("train", "val"), "max_new_tokens": 5}
    cache_embeddings.main(
        cache_embeddings.CacheEmbeddingsConfig(data=(data,), vlm=str(vlm_folder), cache=folder, **options)
    )
    return folder


def ldm_arguments(data: Path, pipeline: Path, cache: Path, output_dir: Path, **changes: Any) -> list[Any]:
    values = {"data": data, "pipeline": pipeline, "cache": cache, "output_dir": output_dir, "max_steps": STEPS}
    values |= {"batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2, "vlm_dropout": 0.3, "condition_dropout": 0.2}
    values |= {"save_every_steps": 1, "log_every_steps": 1, "validate_every_steps": 7, "report_to": "none", **changes}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def vlm_arguments(data: Path, vlm: Path, output_dir: Path, **changes: Any) -> list[Any]:
    values = {"data": data, "vlm": vlm, "output_dir": output_dir, "max_steps": 60, "batch_size": 2, "tuning": "lora"}
    values |= {"lora_rank": 2, "lora_dropout": 0.2, "learning_rate": 1e-3, "validation_split": "val"}
    values |= {"save_every_steps": 1, "log_every_steps": 1, "validate_every_steps": 5, "report_to": "none", **changes}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def moments(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """When to kill: twice right after the start, while loading, after some steps, in the middle of saving."""
    draw = random.Random(seed)
    for kind in islice(cycle(["start", "start", "load", "save", "step", "save", "save"]), count):
        kill = {"states": draw.choice([0, 1, 2]), "saving": kind == "save", "gap": draw.uniform(-0.05, 0.05)}
        if kind in ("start", "load"):
            kill["states"] = None
        earliest, latest = {"start": (0, 0.5), "load": (0.5, 1.5), "step": (0, 0.2), "save": (0, 0.05)}[kind]
        yield {**kill, "delay": draw.uniform(earliest, latest)}


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


def losses(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]


def kill_until_finished(
    server: Server, script: str, arguments: list[Any], kills: int, seed: int, processes: int = 1
) -> list[dict[str, Any]]:
    """Starts and kills a script `kills` times, then lets it finish; what happened at each kill."""
    happened = []
    for kill in moments(kills, seed):
        result = server.run(script, arguments, processes=processes, kill=kill)
        # One of two may hear of the other's death before it is killed itself.
        left_alone = sorted(result["exit_codes"]) == [-9, 70] and "by peer" in server.said
        killed = set(result["exit_codes"]) == {-9} or left_alone
        assert killed, f"a process ended by itself: {result}\n{server.said[-4000:]}"
        happened.append(result)
    server.finish(script, arguments, processes=processes)
    return happened


@pytest.mark.parametrize("processes", [1, 2])
def test_the_ldm_has_the_weights_of_a_run_that_was_never_killed(
    processes: int, server: Server, data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, quiet), processes=processes)
    arguments = ldm_arguments(data, tiny_folder, cache, killed)
    happened = kill_until_finished(server, "train_ldm", arguments, KILLS, seed=processes, processes=processes)
    progress = [result["states"][1] - result["states"][0] for result in happened]
    assert len(progress) == KILLS
    assert sum(result["unfinished"] for result in happened) >= 3  # in the middle of saving
    assert (0, 0) in pairwise(progress)  # twice in a row
    assert sum(steps > 0 for steps in progress) >= 5
    for folder in ("last", "best", f"state/step-{STEPS}"):
        assert_equal_weights(quiet / folder, killed / folder)
    assert sorted(path.name for path in (killed / "state").iterdir()) == [f"step-{STEPS - 1}", f"step-{STEPS}"]
    assert not list(killed.glob(".*.lego-unfinished"))
    for log in ("log.jsonl", "validation.jsonl"):
        assert losses(quiet / log) == losses(killed / log)


def test_a_tuned_vlm_has_the_weights_of_a_run_that_was_never_killed(
    server: Server, data: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    server.finish("tune_vlm", vlm_arguments(data, vlm_folder, quiet))
    kill_until_finished(server, "tune_vlm", vlm_arguments(data, vlm_folder, killed), 5, seed=3)
    for folder in ("vlm", "adapter"):
        assert_equal_weights(quiet / folder, killed / folder)
    for log in ("log.jsonl", "validation.jsonl"):
        assert losses(quiet / log) == losses(killed / log)


def test_a_cut_state_is_named_and_the_one_before_is_used(
    server: Server, data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    quiet, cut = tmp_path / "quiet", tmp_path / "cut"
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, quiet, max_steps=5))
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, cut, max_steps=3))
    file = cut / "state" / "step-3" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, cut, max_steps=5))
    assert "step-3 is damaged (model.safetensors is not what was written)" in server.said
    assert "going on from step-2" in server.said
    assert_equal_weights(quiet / "last", cut / "last")


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_state(
    server: Server, data: Path, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    quiet, full = tmp_path / "quiet", tmp_path / "full"
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, quiet, max_steps=5))
    server.finish("train_ldm", ldm_arguments(data, tiny_folder, cache, full, max_steps=3))
    arguments = ldm_arguments(data, tiny_folder, cache, full, max_steps=5)
    result = server.run("train_ldm", arguments, file_size=20_000)
    assert result["exit_codes"] == [1]
    last = server.said.splitlines()[-1]
    assert last.startswith("error: state of step 4 could not be written to")
    assert last.endswith("free some space and run the same command again, it goes on from step 3.")
    assert "Traceback" not in server.said
    server.finish("train_ldm", arguments)
    assert_equal_weights(quiet / "last", full / "last")
