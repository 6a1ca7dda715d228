"""Order of samples, and what stopping, killing and resuming leave of a run."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from lego_pipeline import training
from lego_pipeline.training import ResumableEma, ResumableSteps, step_indices


class Run:
    """A training run of a small network with dropout, an average of its weights and a schedule of the rate."""

    def __init__(self, output_dir: Path, **changes: Any):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        self.schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=6)
        self.ema = ResumableEma(model.parameters(), decay=0.9)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.ema, self.schedule)
        settings = {"num_samples": 10, "batch_size": 3, "max_steps": 6, "log_every_steps": 2, **changes}
        output_dir.mkdir(exist_ok=True)
        self.steps = ResumableSteps(accelerator, output_dir, **settings)
        self.data = torch.arange(40.0).reshape(10, 4) / 40

    def train(self) -> Iterator[int]:
        """Yields each step's number once it is done."""
        for step, indices in self.steps:
            noise = torch.randn(len(indices), 4)
            loss = self.model(self.data[indices] + noise).square().mean()
            self.steps.update(loss, self.model.parameters(), self.optimizer, self.schedule)
            self.ema.step(self.model.parameters())
            self.steps.log(loss=loss.detach())
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
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), time=lambda: 0.0))


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def test_an_epoch_shows_every_sample_once() -> None:
    shown = [index for step in range(5) for index in step_indices(step, 4, 10, seed=0)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    assert shown[:10] != shown[10:]


def test_an_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = step_indices(3, 4, 10, seed=0)
    torch.manual_seed(2)
    assert step_indices(3, 4, 10, seed=0) == first
    assert step_indices(3, 4, 10, seed=1) != first


def test_a_batch_may_be_larger_than_the_data() -> None:
    indices = step_indices(1, 7, 3, seed=0)
    assert len(indices) == 7
    assert sorted(indices[2:5]) == [0, 1, 2]  # samples 7 to 13 of the stream; an epoch starts at 9


def test_the_order_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    step_indices(0, 4, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Run(tmp_path, num_samples=0)


def test_slices_end_with_the_weights_of_one_run(tmp_path: Path, minute_clock: None) -> None:
    whole = Run(tmp_path / "whole").finish()
    Run(tmp_path / "sliced", max_minutes=1.5).finish()
    assert states(tmp_path / "sliced") == ["step-2"]
    Run(tmp_path / "sliced", max_minutes=0.5).finish()
    assert_equal(Run(tmp_path / "sliced").finish(), whole)


def test_a_killed_run_goes_on_from_its_last_state_to_the_same_weights(tmp_path: Path, minute_clock: None) -> None:
    whole = Run(tmp_path / "whole").finish()
    for step in Run(tmp_path / "killed", save_every_minutes=2.5).train():
        if step == 3:
            break  # step 4 (from 1) is done, state 3 is on disk
    assert states(tmp_path / "killed") == ["step-3"]
    run = Run(tmp_path / "killed")
    assert next(run.train()) == 3
    assert_equal(Run(tmp_path / "killed").finish(), whole)


def test_a_kill_while_saving_leaves_the_state_before(
    tmp_path: Path, minute_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(tmp_path / "whole").finish()
    Run(tmp_path / "killed", max_minutes=1.5).finish()
    run = Run(tmp_path / "killed", save_every_minutes=0.5)

    def save_half(folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(run.steps.accelerator, "save_state", save_half)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert states(tmp_path / "killed") == ["step-2", "step-3.unfinished"]
    assert_equal(Run(tmp_path / "killed").finish(), whole)
    assert states(tmp_path / "killed") == ["step-2", "step-6"]


def test_two_states_are_kept(tmp_path: Path, minute_clock: None) -> None:
    Run(tmp_path, save_every_minutes=0.5).finish()
    assert states(tmp_path) == ["step-5", "step-6"]


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    Run(tmp_path).finish()
    run = Run(tmp_path)
    assert list(run.train()) == []
    assert run.steps.finished


def test_a_steps_random_numbers_are_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = [torch.rand(1).item() for _ in run.steps]
    assert len(set(first)) == 6
    assert [torch.rand(1).item() for _ in Run(tmp_path / "again").steps] == first
    assert [torch.rand(1).item() for _ in Run(tmp_path / "seed", seed=1).steps] != first


def test_an_update_clips_the_gradient_steps_and_forgets_it(tmp_path: Path) -> None:
    steps = Run(tmp_path).steps
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=2)
    steps.update((weight * torch.tensor([30.0, 40.0])).sum(), [weight], optimizer, schedule, max_grad_norm=0.5)
    assert torch.allclose(weight, torch.tensor([-0.3, -0.4]))
    assert weight.grad is None
    assert schedule.get_last_lr() == [0.5]


def test_the_log_has_the_mean_of_each_interval(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, _ in run.steps:
        run.steps.log(loss=float(step))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["samples"], line["loss"]) for line in lines] == [
        (2, 6, 0.5),
        (4, 12, 2.5),
        (6, 18, 4.5),
    ]


def test_state_is_read_without_trusting_pickles(tmp_path: Path) -> None:
    Run(tmp_path, max_steps=1).finish()
    folder = tmp_path / "state" / "step-1"
    assert (folder / "model.safetensors").is_file()
    for file in (folder / "optimizer.bin", *folder.glob("custom_checkpoint_*.pkl")):
        torch.load(file, weights_only=True)


def test_a_restored_average_stays_on_its_device() -> None:
    saved = ResumableEma(torch.nn.Linear(2, 2).parameters()).state_dict()
    with torch.device("meta"):
        ema = ResumableEma(torch.nn.Linear(2, 2).parameters())
    ema.load_state_dict(saved)
    assert {parameter.device.type for parameter in ema.shadow_params} == {"meta"}
