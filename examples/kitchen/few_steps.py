"""What quality costs in passes of the UNet: the guided teacher with several solvers, no guidance, and the student.

    python -m examples.kitchen.few_steps --data runs/kitchen/data/test --output-dir docs/kitchen

Curves, each at several numbers of steps, all from the same descriptions and the same noise:

    guided, SOLVER   the checkpoint with both guidance scales, two or three passes a step: its own scheduler, DPM++ 2M,
                     DDIM and LCM's sampler
    unguided         its own scheduler with one pass a step
    unguided, LCM    the undistilled checkpoint with the student's sampler: what is left is what distillation brings
    student          the adapters of `train/distill_ldm.py`, one pass a step

Per frame: PSNR inside the boxes of hands and things, and whether the judge names the asked action. `few_steps.json`
has the means with 95 % bootstrap intervals, and the share of the teacher's gain over the input copied that is kept;
the teacher is the guided checkpoint's own scheduler at the most steps. `few_steps.png` is the plot, `few_steps.md` the
table. A run that was stopped goes on after the last finished point.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from examples.kitchen.frames import psnr
from examples.kitchen.systems import weights_key
from examples.kitchen.table import Pairs, read_pairs
from lego_pipeline import LegoPipeline, images
from lego_pipeline.atomic import write_atomically, write_text
from lego_pipeline.checkpoints import FAST, KITCHEN
from lego_pipeline.config import run
from lego_pipeline.data.shards import content_key, pixel_key
from lego_pipeline.distillation import NOISE, kept_share, student_scheduler
from lego_pipeline.evaluation.judge import WEIGHTS, Judge, load_judge
from lego_pipeline.evaluation.statistics import bootstrap_interval
from lego_pipeline.fast import FACTS
from lego_pipeline.guidance import needed_passes
from lego_pipeline.training import seed_of

logger = logging.getLogger("few_steps")

MEASURES = {"psnr_inside": "PSNR inside the boxes, dB", "action": "judge names the asked action, share"}
STUDENT, UNGUIDED = "student", "unguided"


@dataclass(kw_only=True)
class FewStepsConfig:
    data: Path  # manifest of held-out pairs
    model: Path = KITCHEN  # LegoPipeline folder
    fast: Path | None = None  # folder of the student; None = `fast` in the model's, if it is there
    output_dir: Path = Path("docs/kitchen")
    split: str = "test"
    pairs: int = 100
    guidance_scale: float | None = None  # of the guided curves; None = those that were distilled, or the checkpoint's
    image_guidance_scale: float | None = None
    teacher_steps: tuple[int, ...] = (4, 5, 10, 20, 50)
    student_steps: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 20
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self):
        if not self.teacher_steps or not self.student_steps:
            raise ValueError("`teacher_steps` and `student_steps` must each have an entry.")
        if min(self.pairs, self.batch_size, *self.teacher_steps, *self.student_steps) < 1:
            raise ValueError("`pairs`, `batch_size`, `teacher_steps` and `student_steps` must be at least 1.")

    @property
    def student(self) -> Path | None:
        """Folder of the few-step model, if there is one.

        Raises:
            FileNotFoundError: one was named, and is not there.
        """
        folder = self.fast or self.model / FAST
        if (folder / FACTS).is_file():
            return folder
        if self.fast is not None:
            raise FileNotFoundError(f"`fast` must hold {FACTS}, found none in {folder}; run train/distill_ldm.py.")
        return None


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    curve: str
    scheduler: Any
    steps: int
    scales: tuple[float, float]

    @property
    def evaluations(self) -> int:
        """Passes of the UNet for one frame."""
        return self.steps * len(needed_passes(*self.scales))


def points_of(scheduler: Any, scales: tuple[float, float], config: FewStepsConfig) -> Iterator[Point]:
    """All points but the student's.

    Args:
        scheduler: the checkpoint's.
        scales: of the guided curves.
        config: says at how many steps.
    """
    noise = {name: scheduler.config[name] for name in NOISE if name in scheduler.config}
    grid = max(50, *config.teacher_steps, *config.student_steps)
    own, sampler = type(scheduler).__name__.removesuffix("Scheduler"), student_scheduler(scheduler, grid)
    solvers = {
        own: scheduler,
        "DPM++ 2M": DPMSolverMultistepScheduler(**noise, timestep_spacing="trailing"),
        "DDIM": DDIMScheduler(**noise, clip_sample=False, timestep_spacing="trailing"),
        "LCM": sampler,
    }
    for name, solver in solvers.items():
        for steps in config.teacher_steps:
            yield Point(f"guided, {name}", solver, steps, scales)
    for curve, solver in ((UNGUIDED, scheduler), (f"{UNGUIDED}, LCM", sampler)):
        for steps in config.student_steps:
            solver.set_timesteps(steps)
            if solver.timesteps[0] > 0:  # "linspace" has its single step at timestep 0, where there is no noise
                yield Point(curve, solver, steps, (1.0, 1.0))


class Drawer:
    """Draws the frames of all pairs with any point's settings; descriptions and encodings are made once.

    Args:
        pipeline: the checkpoint.
        pairs: N pairs.
        batch_size: pairs at a time.
        seed: of descriptions and noise, which a pair has for itself.
    """

    @torch.no_grad()
    def __init__(self, pipeline: LegoPipeline, pairs: Pairs, batch_size: int, seed: int):
        self.batch_size, self.seed, self.ids = batch_size, seed, pairs.rows["id"][:]
        self.conditions, self.frames = [], []
        for start in tqdm(range(0, len(pairs.rows), batch_size), desc="describe"):
            rows = [pairs.rows[i] for i in range(start, min(start + batch_size, len(pairs.rows)))]
            generators = [self._generator("description", row["id"]) for row in rows]
            pictures = [row["image_0"] for row in rows]
            described = pipeline.enhance(pictures, [row["action"] for row in rows], generator=generators)
            condition, self.null_condition = pipeline.encode_condition(described)
            self.conditions.append(condition)
            inputs = [images.to_model_input(picture, *pairs.before.shape[-2:]) for picture in pictures]
            self.frames.append(pipeline.encode_image(torch.stack(inputs)))

    @torch.no_grad()
    def __call__(self, pipeline: LegoPipeline, point: Point) -> torch.Tensor:
        """(N, 3, H, W) float in [-1, 1]."""
        pipeline.register_modules(scheduler=point.scheduler)
        drawn = []
        for number, (condition, frames) in enumerate(zip(self.conditions, self.frames, strict=True)):
            names = self.ids[number * self.batch_size :][: len(frames)]
            generators = [self._generator("noise", name) for name in names]
            height, width = (pipeline.vae_scale_factor * side for side in frames.shape[-2:])
            noise = pipeline.prepare_latents(len(frames), height, width, generators)
            latents = pipeline.denoise(
                noise,
                condition,
                self.null_condition,
                frames,
                num_inference_steps=point.steps,
                guidance_scale=point.scales[0],
                image_guidance_scale=point.scales[1],
                generator=generators,
            )
            pictures: Any = pipeline.decode(latents, "pt")
            drawn.append(pictures.cpu() * 2 - 1)
        return torch.cat(drawn)

    def _generator(self, purpose: str, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(purpose, self.seed, name))


def measure(judge: Judge, pairs: Pairs, pictures: torch.Tensor) -> dict[str, dict[str, float]]:
    """Interval of each of MEASURES over the pairs, for pictures (N, 3, H, W) in [-1, 1]."""
    readings = judge.read(pairs.before, pictures)
    named = [float(reading.action == asked) for reading, asked in zip(readings, pairs.actions, strict=True)]
    inside = psnr(pictures, pairs.target, pairs.regions["inside"]).tolist()
    return {name: asdict(bootstrap_interval(column)) for name, column in (("psnr_inside", inside), ("action", named))}


def gains(results: dict[str, Any], teacher: str) -> None:
    """Adds to every point the share of the teacher's gain over the input copied that it keeps.

    Args:
        results: `points` and `copied`.
        teacher: curve whose point of the most steps is the measure.
    """
    last = max((point for point in results["points"] if point["curve"] == teacher), key=lambda point: point["steps"])
    for point in results["points"]:
        for name in MEASURES:
            mean, best, floor = (entry[name]["mean"] for entry in (point, last, results["copied"]))
            share = kept_share(-mean, -best, -floor)  # which takes errors
            point[f"{name}_kept"] = None if share is None else round(share, 3)


def markdown(results: dict[str, Any]) -> str:
    """The table of all points."""
    columns = [*MEASURES.values(), "of the teacher's gain in PSNR", "and in the judge's share"]
    lines = [f"{results['pairs']} held-out pairs, mean (95 % interval).", ""]
    lines += [f"| | steps | UNet evaluations | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    rows: list[dict[str, Any]] = [
        {"curve": name, "steps": "", "evaluations": "", **results[name]} for name in ("copied", "round_trip")
    ]
    for row in [*rows, *results["points"]]:
        cells = ["{mean:.2f} ({low:.2f} to {high:.2f})".format(**row[name]) for name in MEASURES]
        kept = [row.get(f"{name}_kept") for name in MEASURES]
        cells += ["" if share is None else f"{100 * share:.0f} %" for share in kept]
        lines.append(
            f"| {row['curve'].replace('_', ' ')} | {row['steps']} | {row['evaluations']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Both measures over the passes of the UNet, with what copying and the autoencoder reach.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib; run `pip install "lego-pipeline[eval]"`.') from error
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for number, curve in enumerate(dict.fromkeys(point["curve"] for point in results["points"])):
            points = [point for point in results["points"] if point["curve"] == curve]
            means = [point[name]["mean"] for point in points]
            errors = [[abs(point[name][end] - point[name]["mean"]) for point in points] for end in ("low", "high")]
            style = {"linewidth": 2.5, "color": "black"} if curve == STUDENT else {"linewidth": 1.2}
            evaluations = [point["evaluations"] * 1.012 ** (number - 3) for point in points]  # bars side by side
            axes.errorbar(evaluations, means, errors, label=curve, marker="o", markersize=4, elinewidth=0.7, **style)
        levels = (("copied", "input copied", "bottom"), ("round_trip", "truth through the autoencoder", "top"))
        for level, label, side in levels:
            axes.axhline(results[level][name]["mean"], color="grey", linestyle=":", linewidth=1)
            axes.annotate(label, (1, results[level][name]["mean"]), color="grey", fontsize=8, va=side)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("passes of the UNet for a frame")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=8)
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))


def distilled_scales(student: Path | None, pipeline: LegoPipeline, config: FewStepsConfig) -> tuple[float, float]:
    """Guidance scales of the guided curves."""
    known: Any = pipeline.config
    if student is not None:
        known = json.loads((student / FACTS).read_text(encoding="utf-8")).get("teacher", known)
    asked = {name: getattr(config, name) for name in ("guidance_scale", "image_guidance_scale")}
    text, image = (known[name] if value is None else value for name, value in asked.items())
    return text, image


def main(config: FewStepsConfig) -> None:
    student = config.student
    judge, pairs = load_judge(), read_pairs(config.data, config.split, config.pairs, "data")
    pipeline = LegoPipeline.from_pretrained(config.model).to(config.device)
    pipeline.set_progress_bar_config(disable=True)
    scales = distilled_scales(student, pipeline, config)
    points = list(points_of(pipeline.scheduler, scales, config))
    teacher = points[0].curve
    drawer: Drawer | None = None

    path = config.output_dir / "few_steps.json"
    facts = {
        **{name: getattr(config, name) for name in ("pairs", "split", "seed")},
        "frames": content_key(pairs.rows["id"][:], *(pixel_key(frame) for frame in pairs.rows["image_1"])),
        "weights": weights_key(config.model),
        "student": content_key((student / FACTS).read_text(encoding="utf-8")) if student else None,
        "judge": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "guidance_scale": scales[0],
        "image_guidance_scale": scales[1],
    }
    entries: dict[tuple[str, int], dict[str, Any]] = {}  # all points of these facts, asked for now or before
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before.get(name) == value for name, value in facts.items()):
            entries = {(point["curve"], point["steps"]): point for point in before["points"]}
    with torch.no_grad():
        parts = [pipeline.vae(part.to(config.device)).sample.cpu() for part in pairs.target.split(config.batch_size)]
    ends = {"copied": measure(judge, pairs, pairs.before), "round_trip": measure(judge, pairs, torch.cat(parts))}
    results: dict[str, Any] = {**facts, **ends, "points": list(entries.values())}
    config.output_dir.mkdir(parents=True, exist_ok=True)

    def add(point: Point) -> None:
        nonlocal drawer
        if (point.curve, point.steps) in entries:
            return
        drawer = drawer or Drawer(pipeline, pairs, config.batch_size, config.seed)
        logger.info("%s, %d steps", point.curve, point.steps)
        found = measure(judge, pairs, drawer(pipeline, point))
        entry = {"curve": point.curve, "steps": point.steps, "evaluations": point.evaluations, **found}
        entries[point.curve, point.steps] = entry
        results["points"].append(entry)
        write_text(path, json.dumps(results, indent=1) + "\n")

    for point in points:
        add(point)
    if student is not None:
        pipeline.register_modules(scheduler=points[0].scheduler)  # the last point's was a few-step one's
        pipeline.load_fast(student)
        for steps in config.student_steps:
            add(Point(STUDENT, pipeline.scheduler, steps, (1.0, 1.0)))
    gains(results, teacher)
    write_text(path, json.dumps(results, indent=1) + "\n")
    write_text(config.output_dir / "few_steps.md", markdown(results))
    plot(results, config.output_dir / "few_steps.png")
    print(markdown(results), end="")


if __name__ == "__main__":
    run(main, FewStepsConfig, __doc__)
