"""The plot of quality over passes: which points there are, what is kept of a gain, and (slow) the whole command."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from examples.kitchen import few_steps
from examples.kitchen.few_steps import MEASURES, FewStepsConfig, Point, gains, main, markdown, plot, points_of
from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.distillation import ADAPTED, student_scheduler
from lego_pipeline.fast import save_fast
from lego_pipeline.lora import add_lora


def entry(curve: str, steps: int, evaluations: int, psnr: float, action: float) -> dict[str, Any]:
    values = {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name, mean in
              (("psnr_inside", psnr), ("action", action))}  # fmt: skip
    return {"curve": curve, "steps": steps, "evaluations": evaluations, **values}


@pytest.fixture
def results() -> dict[str, Any]:
    points = [
        entry("guided, Euler", 5, 15, 17.0, 0.7),
        entry("guided, Euler", 50, 150, 18.0, 0.9),
        entry("student", 4, 4, 17.8, 0.5),
    ]
    rows = {name: entry(name, 0, 0, psnr, 0.1) for name, psnr in (("copied", 14.0), ("round_trip", 28.0))}
    return {"pairs": 9, "points": points, **rows}


def test_what_is_kept_is_measured_against_the_teacher_at_the_most_steps(results: dict[str, Any]) -> None:
    gains(results, "guided, Euler")
    assert [point["psnr_inside_kept"] for point in results["points"]] == [0.75, 1.0, 0.95]
    assert [point["action_kept"] for point in results["points"]] == [0.75, 1.0, 0.5]


def test_the_table_has_a_row_for_each_point(results: dict[str, Any]) -> None:
    gains(results, "guided, Euler")
    lines = markdown(results).splitlines()
    assert len(lines) == 4 + 5
    assert lines[-1].startswith("| student | 4 | 4 | 17.80 (17.70 to 17.90) | 0.50 ")
    assert lines[-1].endswith("| 95 % | 50 % |")


def test_the_plot_is_a_picture(results: dict[str, Any], tmp_path: Path) -> None:
    plot(results, tmp_path / "plot.png")
    with PIL.Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 50


def test_passes_are_counted_by_the_scales() -> None:
    assert Point("a", None, 50, (7.5, 1.5)).evaluations == 150
    assert Point("a", None, 50, (1.5, 1.0)).evaluations == 100
    assert Point("a", None, 4, (1.0, 1.0)).evaluations == 4


def test_every_solver_has_the_noise_and_the_prediction_of_the_checkpoint() -> None:
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="sample")
    config = FewStepsConfig(data=Path("data"), teacher_steps=(5, 50), student_steps=(1, 2))
    points = list(points_of(scheduler, (2.0, 1.5), config))
    assert len(points) == 4 * 2 + 1 + 2  # Euler's single step would start without noise
    assert len({(point.curve, point.steps) for point in points}) == len(points)
    for point in points:
        assert point.scheduler.config["prediction_type"] == "sample"
        assert point.scheduler.config["beta_end"] == 0.012
        point.scheduler.set_timesteps(point.steps)
        assert len(point.scheduler.timesteps) == point.steps
        assert point.scheduler.timesteps[0] >= 998


def test_a_named_student_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`fast` must hold fast.json"):
        _ = FewStepsConfig(data=tmp_path, fast=tmp_path).student
    assert FewStepsConfig(data=tmp_path, model=tmp_path).student is None


@pytest.mark.slow
def test_the_whole_command_goes_on_and_an_untrained_student_is_the_checkpoint_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard([dict(row, split="test") for row in read_manifest(FRAMES).select(range(3))], tmp_path / "0.parquet")
    pipe = LegoPipeline.from_pretrained(KITCHEN)
    add_lora(pipe.unet, 2, 2, targets=ADAPTED)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0,
                "guidance_interval": [0, 1]}  # fmt: skip
    facts = {"settings": settings, "teacher": {"guidance_scale": 1.5, "image_guidance_scale": 1.0}}
    save_fast(tmp_path / "fast", pipe.unet.state_dict(), 2, student_scheduler(pipe.scheduler, 50), facts)
    config = FewStepsConfig(
        data=tmp_path,
        fast=tmp_path / "fast",
        output_dir=tmp_path / "out",
        pairs=3,
        teacher_steps=(2,),
        student_steps=(1, 2),
    )
    main(config)
    path = tmp_path / "out" / "few_steps.json"
    whole = json.loads(path.read_text())
    by_curve = {(point["curve"], point["steps"]): point for point in whole["points"]}
    for steps in (1, 2):
        for name in MEASURES:
            student, same = by_curve["student", steps], by_curve["unguided, LCM", steps]
            assert student[name]["mean"] == pytest.approx(same[name]["mean"], abs=1e-3)
    assert by_curve["guided, EulerDiscrete", 2]["evaluations"] == 4
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"few_steps.json", "few_steps.md", "few_steps.png"}

    drawn = []
    measured = few_steps.measure
    monkeypatch.setattr(few_steps, "measure", lambda *arguments: drawn.append(1) or measured(*arguments))
    path.write_text(json.dumps({**whole, "points": whole["points"][:-1]}))
    main(config)
    assert len(drawn) == 3  # copied, round trip, and the one point that was missing
    assert json.loads(path.read_text()) == whole
