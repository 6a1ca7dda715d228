"""Order of samples, and what stopping, killing and resuming leave of a run."""

import json
import logging
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from lego_pipeline.training import (
    ResumableEma,
    ResumableSteps,
    SampleOrder,
    SaveError,
    check_processes,
    cut_log,
    launch,
    order,
    resume_settings,
    sample_generator,
    seed_of,
    start_accelerator,
    steps,
    write_run_files,
)
from lego_pipeline.training import state as state_files

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps precision and accumulation of the first accelerator for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A training run of a small network with dropout, an average of its weights and a schedule of the rate."""

    def __init__(self, output_dir: Path, accumulate: int = 1, schedule: str = "cosine", **changes: Any):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        self.schedule = get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=6)
        self.ema = ResumableEma(model.parameters(), decay=0.9)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.ema, self.schedule)
        settings = {"order": SampleOrder([10]), "batch_size": 3, "max_steps": 6, "log_every_steps": 2, "settings": {}}
        output_dir.mkdir(exist_ok=True)
        self.steps = ResumableSteps(accelerator, output_dir, **{**settings, **changes})
        self.data = torch.arange(40.0).reshape(10, 4) / 40

    def train(self) -> Iterator[int]:
        """Yields each step's number once it is done."""
        for step, indices in self.steps:
            for part in self.steps.micro_batches(indices):
                with self.steps.accumulate(self.model):
                    noise = torch.randn(len(part), 4)
                    loss = self.model(self.data[part] + noise).square().mean()
                    self.steps.update(loss, self.model.parameters(), self.optimizer, self.schedule)
                    self.steps.log(loss=loss.detach())
            self.ema.step(self.model.parameters())
            yield step

    def finish(self) -> list[torch.Tensor]:
        """Trains on; weights and averaged weights at the end."""
        for _ in self.train():
            pass
        return [*(p.detach().clone() for p in self.model.parameters()), *self.ema.shadow_params]


@pytest.fixture
def minute_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the training loop's clock every step takes a minute."""
    minutes = count()
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), time=lambda: 0.0))


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def log_lines(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]


def half_way(folder: Path, **changes: Any) -> Path:
    """A run of six steps that stopped after the third, its states those of steps 2 and 3."""
    for step in Run(folder, save_every_steps=1, **changes).train():
        if step == 3:
            break
    assert states(folder) == ["step-2", "step-3"]
    return folder


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files can't grow past `limit` bytes, which fails as a full disk does.

    Tests that use it ask for `capsys`: what pytest captures otherwise goes to a file.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# The order of samples


def test_an_epoch_shows_every_sample_once() -> None:
    order = SampleOrder([10])
    shown = [index for step in range(5) for index in order.batch(step, 4)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:]


def test_the_order_of_one_data_set_is_a_permutation_seeded_by_run_and_epoch() -> None:
    seeds = [seed_of("epoch", 3, epoch) for epoch in (0, 1)]
    epochs = [torch.randperm(10, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    order = SampleOrder([10], seed=3)
    assert [i for step in range(5) for i in order.batch(step, 4)] == torch.cat(epochs).tolist()
    assert SampleOrder([4, 6], seed=3).batch(2, 4) == order.batch(2, 4)  # joined sets are one


def test_an_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = SampleOrder([10]).batch(3, 4)
    torch.manual_seed(2)
    assert SampleOrder([10]).batch(3, 4) == first
    assert SampleOrder([10], seed=1).batch(3, 4) != first
    assert SampleOrder([10], seed=4096).batch(3, 4) != first  # equal in the lower 32 bits of seed << 20


@pytest.mark.parametrize(
    "order",
    [
        lambda: SampleOrder([10]),
        lambda: SampleOrder([7, 3], [1, 2]),
        lambda: SampleOrder([10], groups=[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]),
    ],
    ids=["plain", "weights", "groups"],
)
def test_a_batch_does_not_depend_on_those_asked_for_before(order: Callable[[], SampleOrder]) -> None:
    steps = [0, 400, 3, 7, 0, 400]
    one = order()
    assert [one.batch(step, 4) for step in steps] == [order().batch(step, 4) for step in steps]


def test_a_batch_may_be_larger_than_the_data() -> None:
    indices = SampleOrder([3]).batch(1, 7)
    assert len(indices) == 7
    assert sorted(indices[2:5]) == [0, 1, 2]  # samples 7 to 13 of the stream; an epoch starts at 9


def test_the_order_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    SampleOrder([10]).batch(0, 4)
    SampleOrder([10, 5], [1, 2]).batch(0, 4)
    SampleOrder([10], groups=[0] * 10).batch(0, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_hold_in_every_thousand_samples() -> None:
    order = SampleOrder([5, 2000], [3, 1])
    for block in range(3):
        indices = [i for step in range(100 * block, 100 * (block + 1)) for i in order.batch(step, 10)]
        assert sum(index < 5 for index in indices) == 750
    assert len({index < 5 for index in indices[:30]}) == 2  # mixed, not one set after the other


def test_each_weighted_data_set_has_its_own_epochs() -> None:
    order = SampleOrder([300, 700], [1, 1])
    indices = [i for step in range(300) for i in order.batch(step, 10)]
    first, second = [i for i in indices if i < 300], [i for i in indices if i >= 300]
    assert [sorted(first[start : start + 300]) for start in (0, 300, 900)] == [list(range(300))] * 3
    assert [sorted(second[start : start + 700]) for start in (0, 700)] == [list(range(300, 1000))] * 2
    assert first[:300] != first[300:600]


def test_places_go_to_the_largest_remainders() -> None:
    assert order._apportion([1, 1, 1], 10) == [4, 3, 3]
    assert order._apportion([0.2, 0.5, 0.3], 7) == [1, 4, 2]  # 1.4, 3.5, 2.1


def test_weights_do_nothing_to_a_single_data_set() -> None:
    assert SampleOrder([10], [0.3]).batch(2, 4) == SampleOrder([10]).batch(2, 4)


def test_a_batch_holds_samples_of_one_group_and_an_epoch_all_samples() -> None:
    groups = [0] * 5 + [1] * 3 + [2] * 9
    order = SampleOrder([8, 9], groups=groups)
    epochs = [[order.batch(step, 4) for step in range(start, start + 6)] for start in (0, 6)]  # 2 + 1 + 3 batches
    for batches in epochs:
        assert all(len(batch) == 4 and len({groups[i] for i in batch}) == 1 for batch in batches)
        assert {i for batch in batches for i in batch} == set(range(17))
        assert max(Counter(i for batch in batches for i in batch).values()) == 2  # the last batch of a group is filled
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [0]}, "at least one sample"),
        ({"sizes": []}, "at least one sample"),
        ({"sizes": [2, 3], "weights": [1]}, r"`data_weights` must be one number for each `data` \(2\), got 1"),
        ({"sizes": [2, 3], "weights": [1, 0]}, "`data_weights` must be positive"),
        ({"sizes": [2, 3], "weights": [1, float("nan")]}, "`data_weights` must be positive"),
        ({"sizes": [2, 3], "weights": [1, 1e-4]}, "`data_weights` must each be at least 1/1000"),
        ({"sizes": [2, 3], "weights": [1, 1], "groups": [0] * 5}, "`data_weights` must be left out"),
        ({"sizes": [2, 3], "groups": [0] * 4}, "`groups` must have one entry for each of the 5 samples, got 4"),
    ],
)
def test_a_mistake_in_the_order_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(**arguments)


def test_a_samples_draws_are_its_own() -> None:
    def draw(*place: int) -> list[float]:
        return torch.rand(3, generator=sample_generator(*place)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*place)) for place in [(0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 1, 12), (0, 11, 2)]}) == 5


def test_seeds_differ_in_the_bits_that_the_cpu_generator_uses() -> None:
    seeds = {order.seed_of("sample", 0, step, sample) & 0xFFFFFFFF for step in range(100) for sample in range(100)}
    assert len(seeds) > 9990


# Stopping, resuming, killing


def test_slices_end_with_the_weights_of_one_run(tmp_path: Path, minute_clock: None) -> None:
    whole = Run(tmp_path / "whole").finish()
    Run(tmp_path / "sliced", max_minutes=1.5).finish()
    assert states(tmp_path / "sliced") == ["step-2"]
    Run(tmp_path / "sliced", max_minutes=0.5).finish()
    assert_equal(Run(tmp_path / "sliced").finish(), whole)
    assert log_lines(tmp_path / "sliced") == log_lines(tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_state_to_the_same_weights_and_log(
    tmp_path: Path, minute_clock: None
) -> None:
    whole = Run(tmp_path / "whole").finish()
    for step in Run(tmp_path / "killed", save_every_minutes=2.5).train():
        if step == 4:
            break  # step 5 (from 1) is done and step 4 logged, state 3 is on disk
    assert states(tmp_path / "killed") == ["step-3"]
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # cut short by the kill
    run = Run(tmp_path / "killed")
    assert next(run.train()) == 3
    assert_equal(Run(tmp_path / "killed").finish(), whole)
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


def test_accumulated_micro_batches_resume_to_the_same_weights(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", accumulate=2).finish()
    half_way(tmp_path / "killed", accumulate=2)
    assert_equal(Run(tmp_path / "killed", accumulate=2).finish(), whole)


def test_a_kill_at_any_call_that_changes_the_disk_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path / "whole").finish()
    calls = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
    begun = half_way(tmp_path / "begun")
    for last in count(1):
        folder = tmp_path / f"killed-{last}"
        shutil.copytree(begun, folder)
        left = count(last, -1)

        def kill(call: Callable[..., Any], left: Iterator[int] = left) -> Callable[..., Any]:
            def killed(*arguments: Any, **options: Any) -> Any:
                if next(left) <= 0:
                    raise KeyboardInterrupt
                return call(*arguments, **options)

            return killed

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, kill(getattr(os, name)))
            patch.setattr(Path, "write_text", kill(Path.write_text))
            try:
                Run(folder, save_every_steps=1, max_steps=5).finish()
                break
            except KeyboardInterrupt:
                pass
        left_over = [path for path in (folder / "state").iterdir() if path.suffix != ".unfinished"]
        assert len(left_over) >= 2
        assert [state_files.flaw_of(state) for state in left_over] == [""] * len(left_over)
        with monkeypatch.context() as patch:  # and again, while it takes up the run
            patch.setattr(steps, "cut_log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                Run(folder).finish()
        assert_equal(Run(folder).finish(), whole)
        assert not list(folder.rglob("*.unfinished"))
    assert last > 15


def test_a_kill_while_accelerate_writes_leaves_the_states_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(tmp_path / "whole").finish()
    half_way(tmp_path / "killed")
    run = Run(tmp_path / "killed", save_every_steps=1)

    def save_half(folder: str) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(run.steps.accelerator, "save_state", save_half)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert states(tmp_path / "killed") == ["step-2", "step-3", "step-4.unfinished"]
    assert_equal(Run(tmp_path / "killed").finish(), whole)
    assert states(tmp_path / "killed") == ["step-3", "step-6"]


def test_two_states_are_kept(tmp_path: Path, minute_clock: None) -> None:
    Run(tmp_path, save_every_minutes=0.5).finish()
    assert states(tmp_path) == ["step-5", "step-6"]


def test_states_are_saved_by_step_numbers_too(tmp_path: Path) -> None:
    seen = []
    for step in Run(tmp_path, save_every_steps=2).train():
        seen.append(states(tmp_path) if step > 1 else [])
    assert seen == [[], [], ["step-2"], ["step-2"], ["step-2", "step-4"], ["step-2", "step-4"]]


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    Run(tmp_path).finish()
    run = Run(tmp_path)
    assert list(run.train()) == []
    assert run.steps.finished
    assert states(tmp_path) == ["step-6"]


def test_a_run_can_be_taken_up_before_its_first_step(tmp_path: Path) -> None:
    half_way(tmp_path)
    run = Run(tmp_path)
    run.steps.restore()
    assert run.steps.step == 3
    assert run.steps.indices(4) == SampleOrder([10]).batch(4, 3)
    assert next(run.train()) == 3


def test_a_steps_random_numbers_are_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = []
    for _ in run.steps:
        first.append(torch.rand(1).item())
        run.steps.seed_random()
        assert torch.rand(1).item() == first[-1]
    assert len(set(first)) == 6
    assert [torch.rand(1).item() for _ in Run(tmp_path / "again").steps] == first
    assert [torch.rand(1).item() for _ in Run(tmp_path / "seed", seed=1).steps] != first


def test_what_the_script_keeps_is_saved_and_restored(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_steps=1, progress={"best": 9.0, "seen": []})
    for step in run.train():
        run.steps.progress["best"] = 5.0 - step
        run.steps.progress["seen"].append(step)
        if step == 3:
            break
    run = Run(tmp_path, progress={"best": 9.0, "new": "default"})
    run.steps.restore()
    assert run.steps.progress == {"best": 3.0, "seen": [0, 1, 2], "new": "default"}


# A step's update


def test_an_update_clips_the_gradient_steps_and_forgets_it(tmp_path: Path) -> None:
    steps = Run(tmp_path).steps
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=2)
    steps.update((weight * torch.tensor([30.0, 40.0])).sum(), [weight], optimizer, schedule, max_grad_norm=0.5)
    assert torch.allclose(weight, torch.tensor([-0.3, -0.4]))
    assert weight.grad is None
    assert schedule.get_last_lr() == [0.5]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (2, 3)])
def test_accumulation_steps_as_one_large_batch_does(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    run = Run(tmp_path, accumulate, batch_size=batch_size, order=SampleOrder([12]), max_steps=2)
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    model, optimizer = run.steps.accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    schedule = get_scheduler("linear", optimizer.optimizer, num_warmup_steps=0, num_training_steps=4)
    for _, indices in run.steps:
        assert len(indices) == 6
        for part in run.steps.micro_batches(indices):
            assert len(part) == batch_size
            with run.steps.accumulate(model):
                loss = (model(torch.tensor(part, dtype=torch.float32)[:, None]) - 1).square().mean()
                run.steps.update(loss, model.parameters(), optimizer, schedule, max_grad_norm=1e9)
    assert schedule.get_last_lr() == [0.005]  # two steps of four
    expected_weight, expected_bias = 0.0, 0.0
    for step, rate in ((0, 0.01), (1, 0.0075)):
        x = torch.tensor(SampleOrder([12]).batch(step, 6), dtype=torch.float64)
        error = 2 * (expected_weight * x + expected_bias - 1)
        expected_weight -= rate * float((error * x).mean())
        expected_bias -= rate * float(error.mean())
    assert model.weight.item() == pytest.approx(expected_weight, abs=1e-5)
    assert model.bias.item() == pytest.approx(expected_bias, abs=1e-5)


# The log


def test_the_log_has_the_mean_of_each_interval(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=5)
    for step, _ in run.steps:
        run.steps.log(loss=float(step))
        if step == 3:
            run.steps.log(rare=torch.tensor(7))
    expected = [{"step": 2, "samples": 6, "loss": 0.5}, {"step": 4, "samples": 12, "loss": 2.5, "rare": 7.0}]
    assert log_lines(tmp_path) == [*expected, {"step": 5, "samples": 15, "loss": 4.0}]


def test_lines_past_a_step_or_cut_short_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "validation.jsonl"
    cut_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 2}\n{"step": 3}\nnull\n{"step": 4}\n{"step": 1}')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 2}\n{"step": 3}\n'


def test_a_run_without_a_state_starts_its_log_anew(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": 1}\n')
    Run(tmp_path, max_steps=2).finish()
    assert [line["step"] for line in log_lines(tmp_path)] == [2]
    assert log_lines(tmp_path)[0]["samples"] == 6


# What a state holds, and damaged ones


def test_a_state_is_complete_hashed_and_read_without_trusting_pickles(tmp_path: Path) -> None:
    Run(tmp_path, max_steps=1).finish()
    folder = tmp_path / "state" / "step-1"
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl",
                     "progress.json", "hashes.json"}  # fmt: skip
    assert set(json.loads((folder / "hashes.json").read_text())) == names - {"hashes.json"}
    for file in (folder / "optimizer.bin", *folder.glob("custom_checkpoint_*.pkl")):
        torch.load(file, weights_only=True)


def cut_file(state: Path) -> None:
    file = state / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(state: Path) -> None:
    content = bytearray((state / "model.safetensors").read_bytes())
    content[-5] ^= 4
    (state / "model.safetensors").write_bytes(bytes(content))


DAMAGES = [
    (cut_file, "optimizer.bin is not what was written"),
    (flip_a_bit, "model.safetensors is not what was written"),
    (lambda state: (state / "custom_checkpoint_0.pkl").unlink(), "custom_checkpoint_0.pkl is missing"),
    (lambda state: (state / "hashes.json").unlink(), "hashes.json is missing"),
    (lambda state: (state / "hashes.json").write_text('{"a'), "hashes.json is not what was written"),
    (lambda state: (state / "hashes.json").write_text("{}"), "hashes.json is not what was written"),
    (lambda state: (state / "progress.json").write_bytes(b""), "progress.json is not what was written"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words.replace(" ", "-") for _, words in DAMAGES])
def test_a_damaged_state_is_moved_aside_and_the_one_before_used(
    damage: Callable[[Path], object], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Run(tmp_path / "whole").finish()
    half_way(tmp_path / "run")
    damage(tmp_path / "run" / "state" / "step-3")
    run = Run(tmp_path / "run")
    assert next(run.train()) == 2
    assert f"step-3 is damaged ({words}): moved to step-3.corrupt, going on from step-2" in caplog.text
    assert states(tmp_path / "run") == ["step-2", "step-3.corrupt"]
    assert_equal(Run(tmp_path / "run").finish(), whole)


def test_a_state_damaged_again_is_moved_aside_again(tmp_path: Path) -> None:
    half_way(tmp_path)
    for _ in range(2):
        cut_file(tmp_path / "state" / "step-3")
        for step in Run(tmp_path, save_every_steps=1).train():
            if step == 3:
                break
        assert states(tmp_path) == ["step-2", "step-3", "step-3.corrupt"]


def test_damaged_states_alone_are_refused_each_time(tmp_path: Path) -> None:
    half_way(tmp_path)
    for state in (tmp_path / "state").iterdir():
        cut_file(state)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step-3: optimizer.bin is not .*step-2: .*delete .* to start from the"):
            Run(tmp_path).finish()
    for state in (tmp_path / "state").iterdir():
        state.rename(state.with_name(f"{state.name}.corrupt"))
    with pytest.raises(ValueError, match="step-2.corrupt: moved aside earlier"):
        Run(tmp_path).finish()
    shutil.rmtree(tmp_path / "state")
    assert next(Run(tmp_path).train()) == 0


class Payload:
    """What a pickle would run when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def test_a_state_with_code_in_it_is_refused_though_its_hashes_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    half_way(tmp_path)
    state = tmp_path / "state" / "step-3"
    torch.save({"decay": Payload()}, state / "custom_checkpoint_0.pkl", pickle_module=pickle)
    hashes = {file.name: state_files.hash_of(file) for file in state.iterdir() if file.name != "hashes.json"}
    (state / "hashes.json").write_text(json.dumps(hashes))
    assert next(Run(tmp_path).train()) == 2
    assert "custom_checkpoint_0.pkl holds more than tensors and numbers" in caplog.text
    assert not (tmp_path / "unpickled").exists()


class Partly(torch.nn.Module):
    """A frozen layer, a trained one whose weight stands under two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.trained.weight
        self.register_buffer("seen", torch.zeros(1))


def partly_run(folder: Path, model: torch.nn.Module | None = None, max_steps: int = 1) -> tuple[Any, ResumableSteps]:
    model = model or Partly()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    folder.mkdir(exist_ok=True)
    order = SampleOrder([3])
    return model, ResumableSteps(accelerator, folder, order=order, batch_size=1, max_steps=max_steps, settings={})


def test_a_state_holds_trained_weights_and_buffers_alone(tmp_path: Path) -> None:
    first, steps = partly_run(tmp_path)
    for _ in steps:
        first.seen += 5
        with torch.no_grad():
            first.trained.weight += 1
    stored = load_file(tmp_path / "state" / "step-1" / "model.safetensors")
    assert len(stored) == 3  # the shared weight once
    assert {"seen", "trained.bias"} < set(stored)
    second, steps = partly_run(tmp_path)
    frozen = second.frozen.weight.clone()
    steps.restore()
    assert torch.equal(second.head.weight, first.trained.weight)
    assert second.head.weight is second.trained.weight
    assert second.seen.item() == 5
    assert torch.equal(second.frozen.weight, frozen)


@pytest.mark.parametrize("change", ["thawed", "wider", "smaller"])
def test_a_state_of_another_model_is_refused(tmp_path: Path, change: str) -> None:
    for _ in partly_run(tmp_path)[1]:
        pass
    model = Partly()
    if change == "thawed":
        model.frozen.requires_grad_(True)
    elif change == "wider":
        model.trained = torch.nn.Linear(3, 5)
    else:
        model.trained.requires_grad_(False)
        model.frozen.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="step-1 must be a state of this model and optimiser, but does not fit"):
        partly_run(tmp_path, model)[1].restore()


def test_a_restored_average_stays_on_its_device() -> None:
    saved = ResumableEma(torch.nn.Linear(2, 2).parameters()).state_dict()
    with torch.device("meta"):
        ema = ResumableEma(torch.nn.Linear(2, 2).parameters())
    ema.load_state_dict(saved)
    assert {parameter.device.type for parameter in ema.shadow_params} == {"meta"}


# Changed settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"rate": 0.2, "data": ["a"]}}, "changed are rate: 0.1 -> 0.2; use another --output-dir"),
        ({"settings": {"rate": 0.1, "data": ["a", "b"]}}, r"data: \['a'\] -> \['a', 'b'\]"),
        ({"settings": {"data": ["a"], "added": 1}}, r"rate: 0.1 -> \(none\); added: \(none\) -> 1"),
        ({"batch_size": 4}, "global batch: 3 -> 4"),
        ({"order": SampleOrder([11])}, r"samples: \[10\] -> \[11\]"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    settings = {"rate": 0.1, "data": ("a",)}
    half_way(tmp_path, settings=settings)
    with pytest.raises(ValueError, match=words):
        Run(tmp_path, **{"settings": settings, **changes}).finish()
    assert states(tmp_path) == ["step-2", "step-3"]
    assert next(Run(tmp_path, settings=settings).train()) == 3


def test_other_micro_batches_of_the_same_step_go_on(tmp_path: Path) -> None:
    half_way(tmp_path, batch_size=4)
    assert next(Run(tmp_path, accumulate=2, batch_size=2).train()) == 3


def test_a_run_does_not_go_on_to_fewer_steps_than_it_has(tmp_path: Path) -> None:
    half_way(tmp_path)
    with pytest.raises(ValueError, match="`max_steps` must be at least 3, as many steps as the run in .* got 2"):
        Run(tmp_path, max_steps=2).finish()
    Run(tmp_path, max_steps=3).finish()
    assert states(tmp_path) == ["step-2", "step-3"]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("at", ["log", "state"])
def test_a_run_that_diverges_stops_before_its_weights_are_saved(tmp_path: Path, broken: str, at: str) -> None:
    intervals = {"log_every_steps": 1} if at == "log" else {"log_every_steps": 100, "save_every_steps": 1}
    run = Run(half_way(tmp_path), **intervals)
    if broken == "loss":
        run.data[:] = torch.nan
    else:
        run.model[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        ValueError, match=rf"`{broken}`.* must stay finite, .* up to 4 of .*step-3\. .*--learning-rate"
    ):
        run.finish()
    assert states(tmp_path) == ["step-2", "step-3"]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_loss_that_is_no_number_at_the_last_step_is_noticed(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=1, log_every_steps=100)
    run.data[:] = torch.nan
    with pytest.raises(ValueError, match="`loss`.* must stay finite, .* no state was saved before"):
        run.finish()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("schedule", "warned"), [("cosine", True), ("constant_with_warmup", False)])
def test_another_length_goes_on_with_a_warning_if_the_rate_depends_on_it(
    tmp_path: Path, schedule: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"lr_scheduler": schedule}
    half_way(tmp_path, schedule=schedule, settings=settings)
    run = Run(tmp_path, schedule=schedule, settings=settings, max_steps=8)
    assert list(run.train()) == [3, 4, 5, 6, 7]
    assert ("`max_steps` was 6 and is 8" in caplog.text) == warned


@dataclass(kw_only=True)
class ScriptConfig:
    data: tuple[Path, ...] = (Path("d"),)
    output_dir: Path = Path("runs")
    batch_size: int = 4
    gradient_accumulation_steps: int = 2
    mixed_precision: str = "no"
    report_to: str = "none"
    expect_processes: int = 0
    rate: float = 0.1
    pictures: int = 3
    max_steps: int = 10
    num_workers: int = 2


def test_settings_that_leave_the_result_alone_are_free() -> None:
    assert resume_settings(ScriptConfig(), {"pictures"}) == {"data": ["d"], "mixed_precision": "no", "rate": 0.1}


# A full disk


@pytest.mark.parametrize("limit", [0, 200, 600, 1200, 2500])
def test_a_full_disk_stops_with_the_last_state_whole(
    tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Run(tmp_path / "whole").finish()
    half_way(tmp_path / "full")
    with full_disk(limit), pytest.raises(SaveError) as stop:
        Run(tmp_path / "full", save_every_steps=1, log_every_steps=100).finish()
    message = str(stop.value)
    assert "state of step 4 could not be written to" in message and "step-4 (" in message
    assert message.endswith("free some space and run the same command again, it goes on from step 3.")
    assert states(tmp_path / "full") == ["step-2", "step-3"]
    assert_equal(Run(tmp_path / "full").finish(), whole)


def test_a_disk_too_full_for_the_first_state_says_that_the_run_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(500), pytest.raises(SaveError, match="run the same command again, it starts from the beginning"):
        Run(tmp_path, save_every_steps=1).finish()
    assert states(tmp_path) == []
    assert next(Run(tmp_path).train()) == 0


def test_a_disk_too_full_for_the_log_is_reported_like_one_for_a_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        full_disk(10),
        pytest.raises(SaveError, match=r"log of step 2 could not be written to .*log.jsonl \(File too"),
    ):
        Run(tmp_path).finish()


# Starting


def test_what_was_decided_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    accelerator = start_accelerator(ScriptConfig(output_dir=tmp_path / "new"))
    assert accelerator.gradient_accumulation_steps == 2
    for part in ("device cpu (", "float32 throughout", "one process; a step takes batch 4 x 2 accumulated = 8"):
        assert part in caplog.text
    assert (tmp_path / "new").is_dir()


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="`output_dir` must be a folder, got the file"):
        start_accelerator(ScriptConfig(output_dir=tmp_path / "run", report_to="none"))


def test_another_number_of_processes_than_expected_is_refused_with_the_line_that_starts_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 2 and 1 runs; .*ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 "):
        start_accelerator(ScriptConfig(output_dir=tmp_path, expect_processes=2))


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got 2 and 1 runs"):
        check_processes(0, 1)
    with pytest.raises(ValueError, match="got 1 and 1 runs"):
        check_processes(1, 1)
    check_processes(0, 2)
    check_processes(2, 2)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_accelerate_quietly_leaves_out_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises((ValueError, ImportError), match=name if name == "FSDP" else "DeepSpeed"):
        start_accelerator(ScriptConfig(output_dir=tmp_path))


def test_a_precision_that_the_launcher_set_and_the_settings_overrule_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert start_accelerator(ScriptConfig(output_dir=tmp_path)).mixed_precision == "no"
    assert "mixed precision bf16 has no effect: `mixed_precision` is no" in caplog.text


def test_averages_go_to_tensorboard(tmp_path: Path) -> None:
    accelerator = start_accelerator(ScriptConfig(output_dir=tmp_path, report_to="tensorboard"))
    order = SampleOrder([10])
    steps = ResumableSteps(
        accelerator, tmp_path, order=order, batch_size=1, max_steps=4, log_every_steps=2, settings={}
    )
    for step, _ in steps:
        steps.log(loss=float(step))
    accelerator.end_training()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trackers" / "script")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.5), (4, 2.5)]


def test_a_run_goes_on_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(launch, "is_tensorboard_available", lambda: False)
    assert start_accelerator(ScriptConfig(output_dir=tmp_path, report_to="tensorboard")).trackers == []
    assert "no tracker is installed" in caplog.text


def test_wandb_must_be_there_if_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match="pip install wandb"):
        start_accelerator(ScriptConfig(output_dir=tmp_path, report_to="wandb"))
    with pytest.raises(ValueError, match="`report_to` must be tensorboard, wandb, all or none, got 'paper'"):
        start_accelerator(ScriptConfig(output_dir=tmp_path, report_to="paper"))


def test_a_run_keeps_its_settings_and_what_it_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train/x.py", "--rate", "0.3"])
    write_run_files(ScriptConfig(output_dir=tmp_path / "new", rate=0.3), Accelerator(cpu=True))
    assert "rate: 0.3\n" in (tmp_path / "new" / "config.yaml").read_text()
    environment = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert environment["command"] == ["train/x.py", "--rate", "0.3"]
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (environment["device"], environment["processes"]) == ("cpu", 1)
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (environment["git"] or {"commit": ""})["commit"] == git.stdout.strip()


def test_an_installed_package_has_no_commit(tmp_path: Path) -> None:
    assert launch._git_state(tmp_path) is None


# Two processes

TWO_PROCESSES = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.optimization import get_scheduler

from lego_pipeline.training import (
    ResumableEma, ResumableSteps, SampleOrder, sample_generator, start_accelerator
)


def train(folder, batch_size, processes, stop=-1, rate=0.1):
    config = SimpleNamespace(output_dir=folder, batch_size=batch_size, gradient_accumulation_steps=2,
                             mixed_precision="no", report_to="none", expect_processes=processes)
    accelerator = start_accelerator(config)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=6)
    ema = ResumableEma(model.parameters(), decay=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema, schedule)
    steps = ResumableSteps(accelerator, folder, order=SampleOrder([30]), batch_size=batch_size, max_steps=6,
                           settings={"rate": rate}, save_every_steps=1, log_every_steps=4)
    for step, indices in steps:
        if step == stop:
            return
        for part in steps.micro_batches(indices):
            with steps.accumulate(model):
                noise = torch.stack([torch.randn(4, generator=sample_generator(0, step, i)) for i in part])
                loss = model(noise + torch.tensor(part)[:, None] / 30).square().mean()
                steps.update(loss, model.parameters(), optimizer, schedule)
                steps.log(loss=loss.detach())
        ema.step(model.parameters())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(folder / "two", 3, 2)
    train(folder / "stopped", 3, 2, stop=3)
    train(folder / "stopped", 3, 2)
    train(folder / "one then two", 3, 2)
    train(folder / "two then one", 3, 2, stop=2)
    try:
        train(folder / "two", 3, 2, rate=0.2)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_either_takes_up_the_others_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    train = runpy.run_path(str(script))["train"]
    train(tmp_path / "one", 6, 1)
    train(tmp_path / "one then two", 6, 1, stop=2)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rate: 0.1 -> 0.2") == 2  # both refuse, neither waits for the other
    train(tmp_path / "two then one", 6, 1)
    weights = {path.name: load_file(path / "state" / "step-6" / "model.safetensors") for path in tmp_path.glob("*o*")}
    assert set(weights) == {"one", "two", "stopped", "one then two", "two then one"}
    for name, found in weights.items():
        for key, value in weights["one"].items():
            assert torch.allclose(found[key], value, atol=1e-5), name
        assert [(line["step"], line["samples"]) for line in log_lines(tmp_path / name)] == [(4, 48), (6, 72)]
        losses = [[line["loss"] for line in log_lines(tmp_path / run)] for run in (name, "one")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for key, value in weights["two"].items():
        assert torch.equal(weights["stopped"][key], value)
