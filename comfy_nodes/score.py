"""Node that scores pictures against true frames with the metrics of `lego evaluate`."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui

from lego_pipeline import images

from . import adapter
from .frames import to_frames

SHOWN = 8  # values in one line


def names_of(text: str) -> list[str]:
    """Names of metrics, separated by commas, blanks or lines.

    Raises:
        ValueError: there are none.
    """
    names = text.replace(",", " ").split()
    if not names:
        raise ValueError(
            '`metrics` must name at least one metric, got none; write for instance "psnr, judge", or all.'
        )
    return names


def matched(name: str, values: Sequence[Any], count: int) -> list[Any]:
    """One value for each picture, a single one repeated.

    Raises:
        ValueError: another number of values.
    """
    if len(values) not in (1, count):
        raise ValueError(f"`{name}` must be one or as many as the pictures ({count}), got {len(values)}; make it so.")
    return list(values) * (count if len(values) == 1 else 1)


def score(
    generated: Sequence[images.Frame],
    target: Sequence[images.Frame],
    start: Sequence[images.Frame] | None,
    actions: Sequence[str] | None,
    descriptions: Sequence[str] | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """Scores of pictures.

    Args:
        generated: N pictures.
        target, start, actions, descriptions: of each picture its true frame, input frame and texts, N or 1; the last
            three None if they are not known, and then metrics that read them are left out.
        names: of metrics, "all" for all.

    Returns:
        {pictures, scores: by name {title, mean, values, unit, higher_is_better, definition}, left_out: by name the
        reason}; a value is None where the metric has no answer. Values of a set metric are none.

    Raises:
        ValueError: an unknown metric, or lists that don't fit.
    """
    from lego_pipeline.evaluation.metrics import FOLDER, open_metrics
    from lego_pipeline.evaluation.metrics.base import Frame, Sample, SetMetric

    folder, count = adapter.metrics_folder(), len(generated)
    weights = {} if folder is None else {FOLDER: folder}
    metrics, missing = open_metrics("all" if "all" in names else names, weights)
    left_out = {item.name: f"needs {item.needs}; {item.how_to_get}" for item in missing}
    known = {"start": start, "action": actions, "description": descriptions}
    starts: list[Any] = [None] * count if start is None else matched("frame", start, count)
    starts = [None if frame is None else images.to_pil(frame) for frame in starts]
    pictures = [Frame(images.to_pil(g), s) for g, s in zip(generated, starts, strict=True)]
    truths = matched("target", target, count)
    truths = [Frame(images.to_pil(t), s) for t, s in zip(truths, starts, strict=True)]
    samples = [
        Sample(id=str(i), action=action or "", description=description)
        for i, (action, description) in enumerate(
            zip(matched("action", actions or [None], count), matched("description", descriptions or [None], count),
                strict=True)
        )
    ]  # fmt: skip
    show, scores = adapter.progress(len(metrics)), {}
    for number, metric in enumerate(metrics, start=1):
        adapter.stop_if_asked()
        lacking = [name for name in metric.reads if name in known and known[name] is None]
        if lacking:
            inputs = {"start": "frame"}
            left_out[metric.name] = f"reads the input {' and '.join(f'`{inputs.get(n, n)}`' for n in lacking)}"
        elif isinstance(metric, SetMetric) and count < 2:
            left_out[metric.name] = "compares sets of pictures, at least two"
        else:
            values = []
            if isinstance(metric, SetMetric):
                sets: list[Any] = [metric.features(frames) for frames in (pictures, truths)]
                mean = float(metric.distance(*sets))
            else:
                values = [float(value) for value in metric.scores(pictures, truths, samples)]
                answers = [value for value in values if not math.isnan(value)]
                mean = sum(answers) / len(answers) if answers else math.nan
            scores[metric.name] = {
                "title": metric.title,
                "mean": _number(mean),
                "values": [_number(value) for value in values],
                "unit": metric.unit,
                "higher_is_better": metric.higher_is_better,
                "definition": metric.definition,
            }
        show(number, None)
    return {"pictures": count, "scores": scores, "left_out": left_out}


def text_of(result: dict[str, Any]) -> str:
    """A line for each metric."""
    lines = []
    for entry in result["scores"].values():
        unit = f" {entry['unit']}" if entry["unit"] else ""
        value = "no answer" if entry["mean"] is None else f"{entry['mean']:.4g}{unit}"
        each = ["-" if v is None else f"{v:.4g}" for v in entry["values"]]
        more = f" (of {', '.join(each[:SHOWN])}{', ...' * (len(each) > SHOWN)})" if len(each) > 1 else ""
        better = "higher" if entry["higher_is_better"] else "lower"
        lines.append(f"{entry['title']}: {value}{more}; {better} is better")
    lines += [f"{name}: left out, {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _number(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


class LegoScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoScore",
            display_name="LEGO Score",
            category="LEGO/evaluate",
            description="Scores generated pictures against the true frames, with the metrics of `lego evaluate`.",
            search_aliases=["psnr", "ssim", "lpips", "metric", "evaluate", "lego"],
            inputs=[
                io.Image.Input("image", tooltip="Generated pictures."),
                io.Image.Input("target", tooltip="The true frames, as many as the pictures, or one for all."),
                io.String.Input(
                    "metrics",
                    default="psnr, ssim",
                    tooltip="Names with commas, or all: psnr, ssim, judge, and with their weights in "
                    "models/lego_metrics egovlp, egovlp_plus, clip, fid, lpips, blip_b, blip_l.",
                ),
                io.Image.Input(
                    "frame", optional=True, tooltip="The input frames; the judge and EgoVLP+ read them, too."
                ),
                io.String.Input(
                    "action",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The asked action, one line for each picture or one for all; the judge reads it.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Description of the true frame, likewise; BLIP's captions are compared with it.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="scores", tooltip="A line for each metric, as the node shows it."),
                io.String.Output(
                    display_name="json", tooltip="The same as JSON, with the value of every picture and definitions."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        target: torch.Tensor,
        metrics: str,
        frame: torch.Tensor | None = None,
        action: str = "",
        description: str = "",
    ) -> io.NodeOutput:
        lines = [
            [line.strip() for line in text.splitlines() if line.strip()] or None for text in (action, description)
        ]
        start = None if frame is None else to_frames(frame)
        result = score(to_frames(image), to_frames(target), start, *lines, names_of(metrics))
        text = text_of(result)
        if not result["scores"]:
            raise ValueError(f"`metrics` must name one that can be computed here, got none.\n{text}")
        return io.NodeOutput(text, json.dumps(result), ui=ui.PreviewText(text))


NODES = [LegoScore]
