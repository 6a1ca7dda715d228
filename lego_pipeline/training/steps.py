"""The steps of a run: given in order, updated, logged, saved, and taken up again after the last saved one."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from tqdm.auto import tqdm

from lego_pipeline.training.order import SampleOrder, seed_of
from lego_pipeline.training.state import cut_log, files_of, flaw_of, hash_of, sync

logger = logging.getLogger(__name__)

STATES = 2  # that are kept


class SaveError(OSError):
    """A state or log could not be written; the message says where the run goes on."""


class ResumableEma(EMAModel):
    """diffusers' average of weights that stays on its device when accelerate, which loads to the CPU, restores it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        device = self.shadow_params[0].device
        super().load_state_dict(state_dict)
        self.to(device)


class ResumableSteps:
    """Iterates over the training steps of a run; running the same command again goes on at the last saved step.

    State is written to `output_dir/state/step-N` through a temporary folder and a rename, so a kill at any moment
    leaves the previous state whole; the last two are kept. A state holds what accelerate saves (of a model only what
    is trained, and buffers: frozen weights come from where they came from), `progress.json` and, written last,
    `hashes.json` with the SHA-256 of every file. A state that does not agree with its hashes is moved aside and the
    one before is used. `output_dir/log.jsonl` gets one object per logging interval. Several machines need an
    `output_dir` that all of them see.

    A run whose losses or gradients are no longer numbers ends with a ValueError before such weights are saved. That is
    looked for when a line is logged and before a state, as every look waits for the device.

    Args:
        accelerator: with all models, optimisers and schedulers prepared, others registered for checkpointing.
        output_dir: of the run.
        order: of the samples.
        batch_size: samples of one process and micro-batch. A step sees batch_size x gradient_accumulation_steps x
            num_processes samples.
        max_steps: where the run is complete.
        settings: all that changes the result, from `resume_settings`; a run goes on under equal ones only.
        max_minutes: stop this slice earlier, saved; 0 for no limit.
        save_every_minutes: between two states.
        save_every_steps: states at multiples of this step number too; 0 for none.
        log_every_steps: between two lines of the log; values are averaged over the interval.
        seed: of the random numbers of a step.
        name: of the progress bar.
        progress: what the script keeps beside (best loss), as JSON can hold it; saved and restored with the state.
            The main process's is the one that is saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        order: SampleOrder,
        batch_size: int,
        max_steps: int,
        settings: dict[str, Any],
        max_minutes: float = 0,
        save_every_minutes: float = 10,
        save_every_steps: int = 0,
        log_every_steps: int = 50,
        seed: int = 0,
        name: str = "train",
        progress: dict[str, Any] | None = None,
    ):
        self.accelerator, self.output_dir, self.order = accelerator, output_dir, order
        self.batch_size, self.max_steps = batch_size, max_steps
        self.max_minutes, self.save_every_minutes = max_minutes, save_every_minutes
        self.save_every_steps, self.log_every_steps = save_every_steps, log_every_steps
        self.seed, self.name = seed, name
        self.samples_per_process = batch_size * accelerator.gradient_accumulation_steps
        self.global_batch = self.samples_per_process * accelerator.num_processes
        self.settings = {**settings, "global batch": self.global_batch, **order.facts}
        self.progress = {} if progress is None else progress
        self.step = 0
        self._saved_step = -1
        self._restored = False
        self._sums: dict[str, tuple[Any, int]] = {}
        self._norms: Any = 0.0  # of the gradients since the last look, added up
        accelerator.register_save_state_pre_hook(self._select_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    @property
    def finished(self) -> bool:
        """True when the run has all its steps, False after a slice that ended early."""
        return self.step >= self.max_steps

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (step, sample numbers of this process); random numbers are seeded for the step before it is given."""
        self.restore()
        started = last_saved = time.monotonic()
        bar = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc=self.name,
            disable=not self.accelerator.is_main_process,
            mininterval=5,
        )
        with bar:
            while not self.finished:
                self.seed_random()
                yield self.step, self.indices(self.step)
                self.step += 1
                bar.update()
                if self.step % self.log_every_steps == 0 or self.finished:
                    bar.set_postfix({name: f"{value:.4f}" for name, value in self._write_log().items()})
                now = time.monotonic()
                save_due = now - last_saved > 60 * self.save_every_minutes
                save_due = save_due or (self.save_every_steps > 0 and self.step % self.save_every_steps == 0)
                time_is_over = self.max_minutes > 0 and now - started > 60 * self.max_minutes
                save_due, time_is_over = self._agreed(save_due, time_is_over)
                if save_due and not self.finished:
                    self.save()
                    last_saved = now
                if time_is_over:
                    break
        self.save()

    def indices(self, step: int) -> list[int]:
        """Sample numbers of this process at a step, for all of the step's micro-batches."""
        first = self.accelerator.process_index * self.samples_per_process
        return self.order.batch(step, self.global_batch)[first : first + self.samples_per_process]

    def seed_random(self) -> None:
        """Seeds torch's global generators for the current step and process; done before each step is given.

        Once more by a script that has a data loader draw from them in between.
        """
        torch.manual_seed(seed_of("step", self.seed, self.step, self.accelerator.process_index))

    def micro_batches(self, indices: list[int]) -> Iterator[list[int]]:
        """A step's sample numbers in parts of `batch_size`, one for each accumulated gradient."""
        for start in range(0, len(indices), self.batch_size):
            yield indices[start : start + self.batch_size]

    def accumulate(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Context of one micro-batch: gradients are averaged over processes in a step's last one only."""
        return self.accelerator.accumulate(model)

    def update(
        self,
        loss: torch.Tensor,
        parameters: Iterable[torch.nn.Parameter],
        optimizer: Any,
        schedule: Any,
        max_grad_norm: float = 1.0,
    ) -> None:
        """Adds a micro-batch's gradients; in a step's last one the norm is clipped and the optimiser steps.

        Args:
            loss: scalar; its gradient is divided by the number of accumulated micro-batches and averaged over
                processes, so a mean over the micro-batch becomes the mean over the step.
            parameters: those that are trained.
            optimizer: prepared by the accelerator.
            schedule: of the learning rate, not prepared; counts steps, however many processes there are.
            max_grad_norm: of all parameters' gradients together.
        """
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return
        norm = self.accelerator.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # by fp16's scaler, on an overflow
            schedule.step()
            if norm is not None:  # which DeepSpeed keeps to itself
                self._norms = self._norms + torch.as_tensor(norm).detach()
        optimizer.zero_grad()

    def log(self, **values: torch.Tensor | float) -> None:
        """Adds a micro-batch's values to the averages of the logging interval, which are taken over all processes."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            # A tensor is summed where it lies: reading it would wait for the device in every step.
            value = value.detach().float() if torch.is_tensor(value) else value
            # Weighted by samples, so that a run that goes on with other micro-batches has the same averages.
            self._sums[name] = (total + value * self.batch_size, count + self.batch_size)

    def _joined_sums(self) -> dict[str, tuple[float, int]]:
        """Sums and counts of the interval over all processes."""
        joined: dict[str, tuple[float, int]] = {}
        for sums in gather_object([{name: (float(total), count) for name, (total, count) in self._sums.items()}]):
            for name, (total, count) in sums.items():
                so_far = joined.get(name, (0.0, 0))
                joined[name] = (so_far[0] + total, so_far[1] + count)
        self._check_numbers({**{name: total for name, (total, _) in joined.items()}, "gradient": float(self._norms)})
        self._norms = 0.0
        return joined

    def _check_numbers(self, values: dict[str, float]) -> None:
        """Ends the run, on all processes alike, if a value is infinite or no number."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if not broken:
            return
        states = self._states()
        kept = f"the last state, from before, is {states[-1]}" if states else "no state was saved before"
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in broken)} must stay finite, but was not in one of the steps up to "
            f"{self.step} of {self.output_dir}; {kept}. Start again in another --output-dir with a lower "
            "--learning-rate or longer --warmup-steps, or with --mixed-precision bf16 or no instead of fp16."
        )

    def _write_log(self) -> dict[str, float]:
        averages = {name: total / count for name, (total, count) in self._joined_sums().items()}
        self._sums = {}
        if averages and self.accelerator.is_main_process:
            line = {"step": self.step, "samples": self.step * self.global_batch, "time": round(time.time(), 1)}
            path = self.output_dir / "log.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, **averages}) + "\n")
            except OSError as error:
                raise SaveError(self._save_message("log", path, error.strerror or str(error))) from error
            self.accelerator.log(averages, step=self.step)
        return averages

    def _agreed(self, *decisions: bool) -> list[bool]:
        """The main process's decisions, for all: clocks differ, but saving and stopping are done together."""
        if self.accelerator.num_processes == 1:
            return list(decisions)
        return broadcast(torch.tensor(decisions, dtype=torch.uint8, device=self.accelerator.device)).bool().tolist()

    def _states(self) -> list[Path]:
        folder = self.output_dir / "state"
        return sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))

    def restore(self) -> None:
        """Takes up the last whole state, if there is one; done by the first step, earlier by who needs `step` before.

        Raises:
            ValueError: settings changed since, no state is whole, or the state is one of another model. On all
                processes alike.
        """
        if self._restored:
            return
        state, error = broadcast_object_list([self._choose_state() if self.accelerator.is_main_process else None])[0]
        if error:
            raise ValueError(error)
        if state is not None:
            self._load(state)
        self._restored = True

    def _load(self, state: Path) -> None:
        try:
            self.accelerator.load_state(str(state))
        except (RuntimeError, ValueError, KeyError) as reason:
            raise ValueError(
                f"{state} must be a state of this model and optimiser, but does not fit ({reason}); use another "
                "--output-dir or the old settings."
            ) from reason
        saved = json.loads((state / "progress.json").read_text(encoding="utf-8"))
        self.step = self._saved_step = saved["step"]
        self.progress.update(saved["progress"])
        if self.accelerator.is_main_process:
            self._sums = {name: (total, count) for name, (total, count) in saved["log"].items()}
            logger.info("going on from step %d of %s", self.step, self.output_dir)

    def _choose_state(self) -> tuple[Path | None, str]:
        """(newest whole state or None, what stands against going on), and a folder ready for it; main process only."""
        folder = self.output_dir / "state"
        for broken_off in folder.glob("*.unfinished"):
            shutil.rmtree(broken_off)
        flaws: dict[Path, str] = {}
        state = None
        for candidate in reversed(self._states()):
            flaw = flaw_of(candidate)
            if not flaw:
                state = candidate
                break
            flaws[candidate] = flaw
        if state is None:
            flaws |= {moved: "moved aside earlier" for moved in sorted(folder.glob("step-*.corrupt"))}
            if flaws:
                listed = "; ".join(f"{path.name}: {flaw}" for path, flaw in flaws.items())
                return None, (
                    f"{folder} must hold a whole state, but has only damaged ones ({listed}); put a whole one back, "
                    f"or delete {folder} to start from the beginning."
                )
            cut_log(self.output_dir / "log.jsonl", 0)
            return None, ""
        saved = json.loads((state / "progress.json").read_text(encoding="utf-8"))
        error = self._changes(saved["settings"], state)
        if error:
            return None, error
        for broken, flaw in flaws.items():
            aside = broken.with_name(f"{broken.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            broken.rename(aside)
            logger.warning("%s is damaged (%s): moved to %s, going on from %s", broken, flaw, aside.name, state.name)
        self._warn_of_other_launch(saved)
        cut_log(self.output_dir / "log.jsonl", saved["step"])
        return state, ""

    def _changes(self, old: dict[str, Any], state: Path) -> str:
        """Names the settings that are not those of the state; empty if there are none."""
        done = int(state.name.removeprefix("step-"))
        if self.max_steps < done:
            return (
                f"`max_steps` must be at least {done}, as many steps as the run in {state.parent.parent} has, got "
                f"{self.max_steps}; use another --output-dir to train for fewer."
            )
        new = json.loads(json.dumps(self.settings))
        missing = "(none)"
        changed = [
            f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name, missing) != new.get(name, missing)
        ]
        if not changed:
            return ""
        return (
            f"settings must stay those of the run in {state.parent.parent}, changed are {'; '.join(changed)}; use "
            "another --output-dir or the old values."
        )

    def _warn_of_other_launch(self, saved: dict[str, Any]) -> None:
        if saved["max_steps"] != self.max_steps and not self.settings.get("lr_scheduler", "").startswith("constant"):
            logger.warning(
                "`max_steps` was %d and is %d: from here on the learning rate follows the new length, the steps "
                "before followed the old one",
                *(saved["max_steps"], self.max_steps),
            )
        if saved["processes"] != self.accelerator.num_processes:
            logger.info(
                "the run had %d process(es) and has %d now: the same batches, but results equal only up to rounding "
                "and dropout",
                *(saved["processes"], self.accelerator.num_processes),
            )

    def save(self) -> None:
        """Writes the state of the current step, all processes together, and drops all but the last two.

        Raises:
            ValueError: a loss or gradient since the last look was no number; nothing is written.
            SaveError: it could not be written. The unfinished folder is gone, the states before are whole.
        """
        if self._saved_step == self.step:
            return
        state = self.output_dir / "state" / f"step-{self.step}"
        unfinished = state.with_name(f"{state.name}.unfinished")
        sums, main = self._joined_sums(), self.accelerator.is_main_process
        problem = self._together(lambda: self._clear(unfinished) if main else None)
        problem = problem or self._together(lambda: self.accelerator.save_state(str(unfinished)))
        problem = problem or self._together(lambda: self._complete(unfinished, state, sums) if main else None)
        if problem:
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise SaveError(self._save_message("state", state, problem))
        self._saved_step = self.step
        if main:
            for old in self._states()[:-STATES]:
                doomed = old.with_name(f"{old.name}.unfinished")  # a kill in between leaves no half of a state
                shutil.rmtree(old.rename(doomed))
        self.accelerator.wait_for_everyone()

    def _together(self, action: Callable[[], Any]) -> str:
        """Runs something on every process and waits; the first failure of any of them in words, for all."""
        reason = ""
        try:
            action()
        except Exception as error:  # whatever it is, the other processes wait to hear of it
            logger.debug("saving failed", exc_info=True)
            reason = " ".join(str(error).split()) or type(error).__name__
        return next(filter(None, gather_object([reason])), "")

    def _clear(self, unfinished: Path) -> None:
        for broken_off in unfinished.parent.glob("*.unfinished"):
            shutil.rmtree(broken_off)
        unfinished.mkdir(parents=True)

    def _complete(self, unfinished: Path, state: Path, sums: dict[str, tuple[float, int]]) -> None:
        """Adds progress and hashes to what accelerate wrote, and gives the folder its name once all is on disk."""
        for file in unfinished.glob("random_states_*.pkl"):  # every step is seeded anew
            file.unlink()
        progress = {
            "step": self.step,
            "max_steps": self.max_steps,
            "processes": self.accelerator.num_processes,
            "settings": self.settings,
            "progress": self.progress,
            "log": sums,
        }
        (unfinished / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
        hashes = {str(file.relative_to(unfinished).as_posix()): hash_of(file) for file in files_of(unfinished)}
        (unfinished / "hashes.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for path in [*files_of(unfinished), unfinished]:
            sync(path)
        unfinished.rename(state)
        sync(state.parent)

    def _save_message(self, what: str, path: Path, reason: str) -> str:
        states = self._states()
        goes_on = f"it goes on from {states[-1].name.replace('-', ' ')}" if states else "it starts from the beginning"
        return (
            f"{what} of step {self.step} could not be written to {path} ({reason}); free some space and run the same "
            f"command again, {goes_on}."
        )

    def _select_weights(self, models: list[torch.nn.Module], weights: list[dict[str, Any]], _: str) -> None:
        """Of every model what is trained, and buffers, under names that don't depend on the number of processes.

        `weights` is empty under FSDP and DeepSpeed, which save in their own ways.
        """
        for i in range(len(weights)):
            weights[i] = _own_weights(self._bare(models[i]))

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        """Reads what `_select_weights` left; a model taken from the list is not read by accelerate again."""
        for i, model in enumerate(models):
            bare = self._bare(model)
            stored = load_file(Path(folder) / (f"model_{i}.safetensors" if i else "model.safetensors"))
            wanted = set(_own_weights(bare))
            missing, unknown = wanted - set(stored), set(stored) - wanted
            if missing or unknown:
                raise ValueError(f"weights missing: {sorted(missing)[:3]}, weights unknown: {sorted(unknown)[:3]}")
            bare.load_state_dict(stored, strict=False)
        models.clear()

    def _bare(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)


def _own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters of a model and its saved buffers; one that stands under several names by the first."""
    own = {name for name, value in model.named_parameters() if value.requires_grad}
    own.update(name for name, _ in model.named_buffers())
    return {name: value for name, value in model.state_dict().items() if name in own}
