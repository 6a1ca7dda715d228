"""What every training loop here shares: the order of samples, resuming, saving, stopping in time, logging.

A step is a pure function of (weights, seed, step number): the samples of a step and its random numbers are derived
from the step number, so a run that was killed and goes on computes what an uninterrupted one would have.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm


def step_indices(step: int, batch_size: int, num_samples: int, seed: int) -> list[int]:
    """Sample numbers of one step: a fresh permutation for each epoch, cut into batches without gaps.

    Args:
        step: counted from 0.
        batch_size: over all processes.
        num_samples: length of the data set.
        seed: of the run.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), num_samples)
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        order = torch.randperm(num_samples, generator=generator)
        indices += order[offset : offset + batch_size - len(indices)].tolist()
    return indices


class ResumableEma(EMAModel):
    """diffusers' average of weights that stays on its device when accelerate, which loads to the CPU, restores it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        device = self.shadow_params[0].device
        super().load_state_dict(state_dict)
        self.to(device)


class ResumableSteps:
    """Iterates over the training steps of a run; running the same command again goes on at the last saved step.

    State is written to `output_dir/state/step-N` by accelerate (weights as safetensors) through a temporary folder and
    a rename, so a kill at any moment leaves the previous state whole. `output_dir/log.jsonl` gets one object per
    logging interval.

    Args:
        accelerator: with all models, optimisers and schedulers prepared, others registered for checkpointing.
        output_dir: of the run.
        num_samples: length of the data set.
        batch_size: samples of one process and step.
        max_steps: where the run is complete.
        max_minutes: stop this slice earlier, saved; 0 for no limit.
        save_every_minutes: between two states.
        log_every_steps: between two lines of the log; losses are averaged over the interval.
        seed: of order and noise.
        name: of the progress bar.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        num_samples: int,
        batch_size: int,
        max_steps: int,
        max_minutes: float = 0,
        save_every_minutes: float = 10,
        log_every_steps: int = 50,
        seed: int = 0,
        name: str = "train",
    ):
        if num_samples < 1:
            raise ValueError("the data set must hold at least one sample, got none.")
        self.accelerator, self.output_dir = accelerator, output_dir
        self.num_samples, self.batch_size, self.max_steps = num_samples, batch_size, max_steps
        self.max_minutes, self.save_every_minutes = max_minutes, save_every_minutes
        self.log_every_steps, self.seed, self.name = log_every_steps, seed, name
        self.step = 0
        self._sums: dict[str, float] = {}
        self._count = 0

    @property
    def finished(self) -> bool:
        """True when the run has all its steps, False after a slice that ended early."""
        return self.step >= self.max_steps

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (step, sample numbers of this process); random numbers are seeded for the step before it is given."""
        self._restore()
        started = last_saved = time.monotonic()
        processes = self.accelerator.num_processes
        bar = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc=self.name,
            disable=not self.accelerator.is_main_process,
            mininterval=5,
        )
        with bar:
            while not self.finished:
                indices = step_indices(self.step, self.batch_size * processes, self.num_samples, self.seed)
                rank = self.accelerator.process_index
                torch.manual_seed(((self.seed * 1_000_003 + self.step) * 4_096 + rank) % 2**63)
                yield self.step, indices[rank * self.batch_size : (rank + 1) * self.batch_size]
                self.step += 1
                bar.update()
                if self._count and self.step % self.log_every_steps == 0:
                    bar.set_postfix({name: f"{value:.4f}" for name, value in self._write_log().items()})
                now = time.monotonic()
                save_due = now - last_saved > 60 * self.save_every_minutes and not self.finished
                time_is_over = self.max_minutes > 0 and now - started > 60 * self.max_minutes
                save_due, time_is_over = self._agreed(save_due, time_is_over)
                if save_due:
                    self._save()
                    last_saved = now
                if time_is_over:
                    break
        self._save()

    def update(
        self,
        loss: torch.Tensor,
        parameters: Iterable[torch.nn.Parameter],
        optimizer: Any,
        schedule: Any,
        max_grad_norm: float = 1.0,
    ) -> None:
        """One step of the optimiser and of its schedule, with the gradient's norm clipped.

        Args:
            loss: scalar of this step.
            parameters: those that are trained.
            optimizer: prepared by the accelerator.
            schedule: of the learning rate; counts steps, however many processes there are.
            max_grad_norm: of all parameters' gradients together.
        """
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def log(self, **values: torch.Tensor | float) -> None:
        """Adds values of the current step to the averages of the logging interval."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += 1

    def _write_log(self) -> dict[str, float]:
        averages = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        if self.accelerator.is_main_process:
            samples = self.step * self.batch_size * self.accelerator.num_processes
            line = {"step": self.step, "samples": samples, "time": round(time.time(), 1), **averages}
            with open(self.output_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        return averages

    def _agreed(self, *decisions: bool) -> list[bool]:
        """The main process's decisions, for all: clocks differ, but saving and stopping are done together."""
        if self.accelerator.num_processes == 1:
            return list(decisions)
        return broadcast(torch.tensor(decisions, dtype=torch.uint8, device=self.accelerator.device)).bool().tolist()

    def _states(self) -> list[Path]:
        folder = self.output_dir / "state"
        return sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))

    def _restore(self) -> None:
        states = self._states()
        if states:
            self.accelerator.load_state(str(states[-1]))
            self.step = int(states[-1].name.removeprefix("step-"))

    def _save(self) -> None:
        state = self.output_dir / "state" / f"step-{self.step}"
        if state.exists():
            return
        unfinished = state.with_name(f"{state.name}.unfinished")
        if self.accelerator.is_main_process:
            for broken_off in unfinished.parent.glob("*.unfinished"):
                shutil.rmtree(broken_off)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for file in unfinished.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            unfinished.rename(state)
            for old in self._states()[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
