"""How far the real hand detector can be believed on rendered hands: its answers to frames whose truth is known.

    python -m examples.kitchen.hand_calibration --hand-detector runs/hand_detector --data runs/kitchen/data/val

It reads frames with hands at rest (the input frames), frames with hands that act (the target frames), and the target
frames rendered again without hands. `calibration.json` in the detector's folder has the shares in which a hand is
found, and how often its side is right; the kitchen's table quotes them. Rendered frames are kept, so that a run that
was stopped goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from examples.kitchen.frames import load_frames, to_unit
from lego_pipeline.atomic import write_text
from lego_pipeline.cli.records import read_png_record, write_png
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.hands import FOUND, Hand, HandDetector, best_presence
from lego_pipeline.evaluation.judge import HANDS, box_corners
from lego_pipeline.evaluation.statistics import bootstrap_interval

CALIBRATION = "calibration.json"


@dataclass(kw_only=True)
class HandCalibrationConfig:
    data: Path  # manifest of rendered pairs
    hand_detector: Path = Path("runs/hand_detector")  # folder of the models, which gets the calibration
    split: Literal["train", "val", "test"] = "val"  # of `data`
    pairs: int = 200  # that are read, the first ones of `data`

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"`pairs` must be at least 1, got {self.pairs}.")


def without_hands(rows: Dataset, split: str, folder: Path) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1]: target frames of the kitchen rendered again without hands, and kept in `folder`."""
    from examples.kitchen.raytrace import trace
    from examples.kitchen.scene import SPLITS, build

    settled, size = SPLITS[split], rows[0]["image_1"].height
    frames = []
    for name in tqdm(rows["id"][:], desc="render without hands"):
        path = folder / f"{name}.png"
        if read_png_record(path) != {"id": name, "size": size}:
            scene = build(
                settled.seed,
                int(name.rsplit("-", 1)[1]),
                kitchens=settled.kitchens,
                first_kitchen=settled.first_kitchen,
                actions=settled.actions,
                show_hands=False,
            )
            frame = trace(scene.parts[1], scene.cameras[1], scene.shot.kitchen.light, size, 2)[0]
            write_png(path, Image.fromarray(frame), {"id": name, "size": size})
        frames.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
    return to_unit(torch.stack(frames))


def side_is_right(hands: Sequence[Hand], boxes: torch.Tensor) -> list[float]:
    """Of each found hand whose centre lies in the box of one hand only: 1 if the side is right, else 0.

    Args:
        hands: of a frame.
        boxes: (2, 4) true boxes in the order of `HANDS`, NaN where there is none.
    """
    answers = []
    for hand in hands:
        x, y = (hand.box[0] + hand.box[2]) / 2, (hand.box[1] + hand.box[3]) / 2
        around = [
            side
            for side, (x0, y0, x1, y1) in zip(HANDS, boxes.tolist(), strict=True)
            if x0 <= x <= x1 and y0 <= y <= y1
        ]
        if hand.presence > FOUND and len(around) == 1:
            answers.append(float((hand.right > 0.5) == (around[0] == "right")))
    return answers


def calibrate(detector: HandDetector, rows: Dataset, split: str, folder: Path) -> dict:
    """How the detector answers on frames whose truth is known.

    Args:
        detector: with its models.
        rows: N pairs of the rendered kitchen.
        split: of them.
        folder: for the frames rendered without hands.
    """
    frames = to_unit(load_frames(rows))
    kinds = {"at rest": frames[:, 0], "acting": frames[:, 1], "no hands": without_hands(rows, split, folder)}
    boxes = {
        kind: [box_corners(boxes)[:2] for boxes in rows[f"boxes_{k}"][:]]
        for k, kind in enumerate(("at rest", "acting"))
    }
    result, scores = {}, {}
    for kind, pictures in kinds.items():
        answers = detector.read(pictures, kind)
        scores[kind] = np.array([best_presence(hands) for hands in answers])
        result[kind] = {
            "found": asdict(bootstrap_interval((scores[kind] > FOUND).astype(float).tolist())),
            "score": asdict(bootstrap_interval(scores[kind].tolist())),
        }
        if kind in boxes:
            sides = [
                side for hands, true in zip(answers, boxes[kind], strict=True) for side in side_is_right(hands, true)
            ]
            result[kind]["side"] = asdict(bootstrap_interval(sides)) if sides else None
    higher = scores["acting"][:, None] - scores["no hands"]
    result["acting scores higher than no hands"] = float(np.mean((higher > 0) + (higher == 0) / 2))
    return result


def calibration_text(hand_detector: Path) -> str:
    """What was measured of the detector in a folder, in words."""
    path = hand_detector / CALIBRATION
    if not path.is_file():
        return "How far the real hand detector can be believed on rendered hands was not measured."
    calibration = json.loads(path.read_text(encoding="utf-8"))
    shares = {
        kind: "{:.0f} % ({:.0f} to {:.0f})".format(
            *(100 * calibration[kind]["found"][key] for key in ("mean", "low", "high"))
        )
        for kind in ("at rest", "acting", "no hands")
    }
    return (
        f"On {calibration['pairs']} pairs of split {calibration['split']} the real hand detector finds a hand in "
        f"{shares['at rest']} of the input frames, whose hands are at rest, in {shares['acting']} of the target "
        f"frames, whose hands act, and in {shares['no hands']} of the same frames rendered without hands. Its side is "
        f"right for {_side(calibration['at rest'])} of the hands at rest and {_side(calibration['acting'])} of those "
        "that act."
    )


def _side(entry: dict) -> str:
    return "none" if entry["side"] is None else f"{100 * entry['side']['mean']:.0f} %"


def main(config: HandCalibrationConfig) -> None:
    detector = HandDetector(config.hand_detector)
    rows = read_manifest(config.data, config.split)
    if len(rows) < config.pairs:
        raise ValueError(
            f"`data` must hold {config.pairs} pairs of split {config.split}, got {len(rows)}; render more."
        )
    rows = rows.select(range(config.pairs))
    foreign = [name for name in rows["id"][:] if not re.fullmatch(rf"kitchen-{config.split}-\d+", name)]
    if foreign:
        raise ValueError(f"`data` must hold pairs of examples.kitchen.render, got the id {foreign[0]!r}; render some.")
    found = calibrate(detector, rows, config.split, config.hand_detector / "without_hands")
    calibration = {"split": config.split, "pairs": config.pairs, **found}
    write_text(config.hand_detector / CALIBRATION, json.dumps(calibration, indent=1) + "\n")
    print(calibration_text(config.hand_detector))


if __name__ == "__main__":
    run(main, HandCalibrationConfig, __doc__)
