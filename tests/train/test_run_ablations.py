"""train/run_ablations.py: a grid drawn, scored, stopped and gone on with, on the tiny pipeline and on the kitchen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.cli.records import read_png_record
from lego_pipeline.evaluation.metrics import pixels
from train import run_ablations
from train.run_ablations import DrawCell, RunAblationsConfig, main, random_projector

ROWS = [
    {"name": "label", "parts": "label"},
    {"name": "random", "projections": "random"},
    {"name": "all"},
]
SWEEPS = [{"setting": "steps", "values": [1, 2]}]


@pytest.fixture
def make_config(data: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., RunAblationsConfig]:
    def make(rows: list[dict[str, Any]] = ROWS, sweeps: list[dict[str, Any]] = SWEEPS, **changes: Any) -> Any:
        grid = tmp_path / "grid.yaml"
        grid.write_text(yaml.safe_dump({"rows": rows, "sweeps": sweeps}))
        settings: dict[str, Any] = {
            "model": str(tiny_folder),
            "metrics": ("psnr",),
            "device": "cpu",
            "batch_size": 2,
            "pairs": 2,
        }
        settings |= {"grid": grid, "data": data, "output_dir": tmp_path / "out"}
        return RunAblationsConfig(**{**settings, **changes})

    return make


def cells(config: RunAblationsConfig) -> dict[str, Any]:
    results = json.loads((config.output_dir / "results.json").read_text())
    return {entry["name"]: entry for entry in results["cells"]}


def pictures(config: RunAblationsConfig, cell: str) -> list[np.ndarray]:
    files = sorted((config.output_dir / "pictures" / cell).glob("*.png"))
    return [np.asarray(PIL.Image.open(file)).astype(int) for file in files]


def test_a_grid_becomes_a_table_and_a_plot_and_is_not_drawn_twice(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    main(config)
    found = cells(config)
    assert list(found) == ["label", "random", "all", "all, steps 1", "all, steps 2", "input copied"]
    assert {name: found[name]["weights"] for name in ("label", "random", "all")} == {
        "label": "at inference", "random": "at inference", "all": "as it is"
    }  # fmt: skip
    assert (found["all"]["settings"]["steps"], found["all, steps 1"]["settings"]["steps"]) == (3, 1)
    assert all(entry["scores"]["psnr"]["count"] == 2 for entry in found.values())
    assert "| random | at inference |" in (config.output_dir / "table.md").read_text()
    with PIL.Image.open(config.output_dir / "ablations.png") as plot:
        assert plot.width > 500

    [drawn] = (pictures(config, name) for name in ("random",))
    assert not np.array_equal(drawn[0], pictures(config, "all")[0])
    texts = [read_png_record(file) for file in sorted((config.output_dir / "pictures" / "all").glob("*.png"))]
    others = [read_png_record(file) for file in sorted((config.output_dir / "pictures" / "random").glob("*.png"))]
    assert [text["description"] for text in texts if text] == [text["description"] for text in others if text]

    before = {file: file.read_bytes() for file in config.output_dir.glob("*.*")}
    monkeypatch.setattr(DrawCell, "open", lambda *_, **__: pytest.fail("a finished cell was drawn again"))
    monkeypatch.setattr(pixels.Psnr, "scores", lambda *_, **__: pytest.fail("a finished cell was scored again"))
    main(config)
    assert {file: file.read_bytes() for file in config.output_dir.glob("*.*")} == before


def test_a_run_that_was_stopped_draws_what_is_missing_only(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(rows=[ROWS[0], ROWS[2]], sweeps=[])
    draw = DrawCell.draw_batch
    drawn: list[str] = []

    def stop_at_the_second(self: DrawCell, system: Any, cache: Any, jobs: Any, frames: Any) -> None:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(self.row.name)
        draw(self, system, cache, jobs, frames)

    monkeypatch.setattr(DrawCell, "draw_batch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main(config)

    def draw_and_note(self: DrawCell, system: Any, cache: Any, jobs: Any, frames: Any) -> None:
        drawn.append(self.row.name)
        draw(self, system, cache, jobs, frames)

    monkeypatch.setattr(DrawCell, "draw_batch", draw_and_note)
    main(config)
    assert drawn == ["label", "all"]
    assert cells(config)["all"]["scores"]["psnr"]["count"] == 2


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")  # a letter each, and the kitchen tells more
def test_rows_of_another_model_and_of_another_vlm(
    make_config: Callable, make_tiny_pipeline: Callable, qwen_folder: Path, tmp_path: Path
) -> None:
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path / "twin")
    rows = [
        {"name": "twin", "parts": "label", "model": str(tmp_path / "twin")},
        {"name": "other VLM", "vlm": str(qwen_folder)},
        {"name": "true text", "descriptions": "manifest"},
    ]
    config = make_config(rows=rows, sweeps=[])
    main(config)
    found = cells(config)
    assert [found[row["name"]]["weights"] for row in rows] == ["trained", "at inference", "as it is"]
    assert not np.array_equal(pictures(config, "other-vlm")[0], pictures(config, "true-text")[0])
    [first, _] = sorted((config.output_dir / "pictures" / "true-text").glob("*.png"))
    record = read_png_record(first)
    assert record and record["description"] == record["request"]["description"]


def test_a_random_projector_has_the_sizes_of_the_trained_one_and_comes_from_the_seed(
    tiny_pipeline: LegoPipeline,
) -> None:
    own = tiny_pipeline.projector
    first, again, other = (random_projector(own, seed) for seed in (0, 0, 1))
    assert dict(first.config) == dict(own.config) and not first.training
    weights = [model.image_projection.weight for model in (own, first, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[0]) and not torch.equal(weights[1], weights[3])


def test_what_cannot_be_had_is_refused_before_anything_is_drawn(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_ablations, "draw", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(FileNotFoundError, match="`metrics` must be ones whose weights are here, but clip needs"):
        main(make_config(metrics=("psnr", "clip")))
    with pytest.raises(ValueError, match="`pairs` must be at most 6"):
        main(make_config(pairs=7))
    for changes, expected in (
        ({"metrics": ("beauty",)}, "`metrics` must be of"),
        ({"weights": ("clip",)}, "`weights` must be written NAME=PATH"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_config(**changes)


@pytest.mark.slow
def test_the_embedded_kitchen_is_drawn_and_scored_between_floor_and_ceiling(make_config: Callable) -> None:
    rows = [{"name": "random", "projections": "random"}, {"name": "all"}]
    sweeps = [{"setting": "guidance_scale", "values": [0, 1.5]}]  # without text; the checkpoint's own
    changes = {"data": FRAMES, "pairs": 6, "model": None, "metrics": ("psnr", "ssim", "judge"), "batch_size": 6}
    config = make_config(rows=rows, sweeps=sweeps, **changes)
    main(config)
    found = {name: entry["scores"] for name, entry in cells(config).items()}
    judged = {name: scores["judge"]["mean"] for name, scores in found.items()}
    assert judged["input copied"] < judged["all"] < judged["true frame"]
    assert found["all"]["psnr"]["mean"] > found["input copied"]["psnr"]["mean"] + 2
    assert found["all"] == found["all, guidance scale 1.5"]
    for name in ("random", "all, guidance scale 0"):
        assert found[name]["psnr"]["mean"] != found["all"]["psnr"]["mean"]
