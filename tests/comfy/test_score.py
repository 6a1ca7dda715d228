"""LegoScore: the metrics of `lego evaluate` on IMAGE batches, with what can't be computed named and not in the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.metrics import open_metrics
from lego_pipeline.evaluation.metrics.base import Frame, Sample
from lego_pipeline.images import to_rgb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNT = 4
Run = Callable[..., tuple[Any, ...]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    manifest = read_manifest(FRAMES)
    return [manifest[i] for i in range(COUNT)]


def image_of(rows: list[dict[str, Any]], column: str) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(to_rgb(row[column]))) for row in rows]).float() / 255


def test_scores_are_those_of_the_evaluation(rows: list[dict[str, Any]], run_node: Run) -> None:
    text, as_json = run_node(
        "LegoScore",
        image=image_of(rows, "image_0"),
        target=image_of(rows, "image_1"),
        metrics="psnr, judge",
        frame=image_of(rows, "image_0"),
        action="\n".join(row["action"] for row in rows),
    )
    result = json.loads(as_json)
    assert result["pictures"] == COUNT and result["left_out"] == {}
    copies = [Frame(row["image_0"], row["image_0"]) for row in rows]
    truths = [Frame(row["image_1"], row["image_0"]) for row in rows]
    samples = [Sample(id=row["id"], action=row["action"]) for row in rows]
    for metric in open_metrics(["psnr", "judge"])[0]:
        expected = metric.scores(copies, truths, samples)  # ty: ignore[unresolved-attribute]
        entry = result["scores"][metric.name]
        assert entry["values"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert entry["mean"] == pytest.approx(expected.mean(), abs=1e-4) and entry["definition"] == metric.definition
        assert f"{metric.title}: {expected.mean():.4g} {metric.unit}" in text


def test_the_judge_names_the_action_of_the_true_frame(rows: list[dict[str, Any]], run_node: Run) -> None:
    images = {"target": image_of(rows, "image_1"), "frame": image_of(rows, "image_0"), "metrics": "judge"}
    texts = {"action": "\n".join(row["action"] for row in rows)}
    true = json.loads(run_node("LegoScore", image=images["target"], **images, **texts)[1])
    copied = json.loads(run_node("LegoScore", image=images["frame"], **images, **texts)[1])
    assert true["scores"]["judge"]["mean"] > copied["scores"]["judge"]["mean"]
    unknown = json.loads(run_node("LegoScore", image=images["target"], **images, action="fold the shirt")[1])
    assert unknown["scores"]["judge"]["mean"] is None


def test_one_true_frame_is_used_for_all_pictures(rows: list[dict[str, Any]], run_node: Run) -> None:
    target = image_of(rows[:1], "image_1")
    text, as_json = run_node("LegoScore", image=image_of(rows, "image_1"), target=target, metrics="psnr")
    values = json.loads(as_json)["scores"]["psnr"]["values"]
    assert values[0] > 50 > max(values[1:]) and "of 58.92, " in text


def test_what_can_not_be_computed_is_named_and_the_rest_is(rows: list[dict[str, Any]], run_node: Run) -> None:
    text, as_json = run_node(
        "LegoScore", image=image_of(rows, "image_0"), target=image_of(rows, "image_1"), metrics="all"
    )
    result = json.loads(as_json)
    assert "psnr" in result["scores"] and "egovlp.pth" in result["left_out"]["egovlp"]
    assert result["left_out"]["judge"] == "reads the input `frame` and `action`"
    for name in result["left_out"]:
        assert f"{name}: left out, " in text


def test_weights_are_looked_for_beside_the_models(rows: list[dict[str, Any]], run_node: Run, comfyui: Path) -> None:
    pytest.importorskip("timm")
    folder = comfyui / "models" / "lego_metrics"
    folder.mkdir()
    (folder / "egovlp.pth").write_bytes(b"no weights")
    try:
        with pytest.raises(ValueError, match="egovlp.pth"):
            run_node("LegoScore", image=image_of(rows, "image_0"), target=image_of(rows, "image_1"), metrics="egovlp")
    finally:
        (folder / "egovlp.pth").unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": " , "}, "`metrics` must name at least one"),
        ({"metrics": "psnr, beauty"}, "`metrics` must be all or of .* got beauty"),
        ({"metrics": "egovlp"}, "`metrics` must name one that can be computed here, got none.\negovlp: left out"),
        ({"target": torch.zeros(3, 32, 32, 3)}, r"`target` must be one or as many as the pictures \(4\), got 3"),
        ({"action": "open\nclose"}, r"`action` must be one or as many as the pictures \(4\), got 2"),
        ({"frame": torch.zeros(2, 32, 32, 3)}, r"`frame` must be one or as many as the pictures \(4\), got 2"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str, rows: list[dict[str, Any]], run_node: Run) -> None:
    inputs = {"image": image_of(rows, "image_0"), "target": image_of(rows, "image_1"), "metrics": "psnr"}
    with pytest.raises(ValueError, match=message):
        run_node("LegoScore", **(inputs | changes))


def test_the_server_shows_the_scores_in_the_node(server: Any, rows: list[dict[str, Any]]) -> None:
    to_rgb(rows[0]["image_1"]).save(server.base / "input" / "true.png")
    load = {"class_type": "LoadImage", "inputs": {"image": "frame.png"}}
    true = {"class_type": "LoadImage", "inputs": {"image": "true.png"}}
    inputs = {"image": ["1", 0], "target": ["2", 0], "frame": ["1", 0], "metrics": "psnr judge"}
    graph = {"1": load, "2": true}
    graph["3"] = {"class_type": "LegoScore", "inputs": {**inputs, "action": rows[0]["action"], "description": ""}}
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    [text] = entry["outputs"]["3"]["text"]
    assert "PSNR: " in text and "judge: action: " in text
