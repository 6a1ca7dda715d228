"""A real hand detector: an opinion on hands that no training here has touched, learnt from photographs of real hands.

MediaPipe's palm detector and hand landmark model (Zhang et al., "MediaPipe Hands: On-device Real-time Hand Tracking",
2020, arXiv 2006.10214), two files that `python -m examples.kitchen.hand_detector` takes out of the wheel of
`mediapipe`. LiteRT runs them. What is done around them follows MediaPipe's graphs `palm_detection_cpu`,
`palm_detection_detection_to_roi` and `hand_landmark_cpu`: the frame at 192 x 192 with black borders, anchors, weighted
suppression, then for each palm a larger square, turned until the fingers point up, for the landmark model. One thing
is added: hands are small in egocentric frames, so the palm detector also sees four overlapping parts of a frame,
enlarged. `examples/kitchen/hand_calibration.py` measures how far the two can be believed on rendered hands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from lego_pipeline.evaluation.judge import box_overlap

PALM, LANDMARKS = "palm_detection_full.tflite", "hand_landmark_full.tflite"

PALM_SIZE, LANDMARK_SIZE = 192, 224  # pixels along a side of what the models see
STRIDES = ((8, 2), (16, 6))  # pixels between the places of anchors, and anchors at each place
SUPPRESSION = 0.3  # overlap from which two detections are one palm
WRIST, MIDDLE_KNUCKLE = 2, 4  # among a palm's nine points: two corners of its box, then seven of the hand
HAND_SCALE, HAND_SHIFT = 2.6, 0.5  # of the hand's square, in sides of the palm's box; the shift is along the fingers
PALM_THRESHOLD = 0.5  # score from which a palm is looked at more closely
FOUND = 0.5  # probability from which a hand counts as found
MOST_HANDS = 4  # in a frame
PART = 0.7  # side of the enlarged parts, of the frame's longer side
SAME_PLACE = 0.3  # overlap from which two hands are in one place

DETECTED = {
    "detector_found": "hand found",
    "detector_score": "mean score",
    "detector_place": "found where it is in the true frame",
}
Model = Callable[[torch.Tensor], list[torch.Tensor]]  # (1, S, S, 3) float32 in [0, 1] -> its outputs


class Hand(NamedTuple):
    """What is found below one palm."""

    palm: float  # the palm detector's score
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 around 21 landmarks, fractions of the frame
    presence: float  # probability that this is a hand, by the landmark model
    right: float  # likewise that it is a right hand


class Square(NamedTuple):
    """A square in a frame; x, y of its centre and its side in pixels, turned clockwise by an angle in radians."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def pixels(self, places: torch.Tensor) -> torch.Tensor:
        """Points (..., 2) in pixels of the frame, of places in fractions of the square from its upper left corner."""
        right, down = ((places - 0.5) * self.side).unbind(-1)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return torch.stack([self.x + cos * right - sin * down, self.y + sin * right + cos * down], -1)


def anchors() -> torch.Tensor:
    """(2016, 2) x, y of the palm detector's anchors in fractions of its input, which all have the input's size.

    Layers of strides 8, 16, 16, 16 with two anchors at a place each; those of one stride share their places
    (MediaPipe's `SsdAnchorsCalculator` with the options of `palm_detection_cpu`).
    """
    layers = []
    for stride, count in STRIDES:
        line = (torch.arange(PALM_SIZE // stride) + 0.5) * stride / PALM_SIZE
        y, x = torch.meshgrid(line, line, indexing="ij")
        layers.append(torch.stack([x, y], -1).reshape(-1, 2).repeat_interleave(count, 0))
    return torch.cat(layers)


def decode_palms(values: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The palm detector's candidates whose score is high enough, before suppression.

    Args:
        values: (2016, 18) centre, width and height and seven points, in pixels; centre and points from the anchor.
        logits: (2016,) of the scores.

    Returns:
        scores (K,), and (K, 9, 2) points in fractions of the input: two corners of the palm's box, then the seven.
    """
    scores = logits.clamp(-100, 100).sigmoid()
    kept = scores >= PALM_THRESHOLD
    places = anchors()[kept][:, None]
    points = values[kept].reshape(-1, 9, 2) / PALM_SIZE
    centre, half = points[:, :1] + places, points[:, 1:2] / 2
    return scores[kept], torch.cat([centre - half, centre + half, points[:, 2:] + places], 1)


def suppress(scores: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted suppression: of palms that overlap one is left, their mean by scores, with the best one's score.

    Args:
        scores: (K,).
        points: (K, 9, 2), the first two the corners of the box.

    Returns:
        The same of the L palms that are left, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    scores, points = scores[order], points[order]
    boxes = points[:, :2].flatten(1)
    left = torch.ones(len(scores), dtype=torch.bool)
    best, merged = [], []
    for i in range(len(scores)):
        if left[i]:
            same = left & (box_overlap(boxes[i], boxes) >= SUPPRESSION)
            same[i] = True
            left &= ~same
            best.append(scores[i])
            merged.append((points[same] * scores[same, None, None]).sum(0) / scores[same].sum())
    return torch.stack(best) if best else scores, torch.stack(merged) if merged else points


def hand_square(palm: torch.Tensor) -> Square:
    """The square of the whole hand, turned until the line from wrist to middle knuckle points up.

    Args:
        palm: (9, 2) points in pixels.
    """
    across, down = (palm[MIDDLE_KNUCKLE] - palm[WRIST]).tolist()
    angle = math.pi / 2 - math.atan2(-down, across)
    width, height = (palm[1] - palm[0]).tolist()
    x, y = ((palm[0] + palm[1]) / 2).tolist()
    shift = HAND_SHIFT * height
    return Square(x + shift * math.sin(angle), y - shift * math.cos(angle), HAND_SCALE * max(width, height), angle)


def cut(frame: torch.Tensor, square: Square, size: int, outside: Literal["zeros", "border"]) -> torch.Tensor:
    """(1, size, size, 3): a square of a frame (3, H, W), bilinear; `outside` is what lies beyond the frame's edges."""
    line = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    height, width = frame.shape[-2:]
    grid = 2 * square.pixels(torch.stack([x, y], -1)) / torch.tensor([width, height]) - 1
    picture = functional.grid_sample(frame[None], grid[None], padding_mode=outside, align_corners=False)
    return picture.permute(0, 2, 3, 1).contiguous()


def views(height: int, width: int) -> list[Square]:
    """The squares that the palm detector sees of a frame: the whole of it, and parts at its corners, enlarged."""
    side = max(height, width)
    half = PART * side / 2
    corners = [Square(x, y, 2 * half) for y in (half, height - half) for x in (half, width - half)]
    return [Square(width / 2, height / 2, side), *corners]


def load_model(path: Path) -> Model:
    """A .tflite file as a function.

    Raises:
        FileNotFoundError: it isn't there.
        ImportError: LiteRT isn't installed.
        ValueError: the file is no such model.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as error:
        raise ImportError('the hand detector needs LiteRT; run `pip install "lego-pipeline[kitchen]"`.') from error
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} must hold {path.name}, found none; "
            f"run `python -m examples.kitchen.hand_detector --output-dir {path.parent}`."
        )
    try:
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} must be a LiteRT model, got: {error}; delete it and fetch it again.") from error
    given = interpreter.get_input_details()[0]["index"]
    wanted = [output["index"] for output in interpreter.get_output_details()]

    def model(picture: torch.Tensor) -> list[torch.Tensor]:
        interpreter.set_tensor(given, picture.numpy())
        interpreter.invoke()
        return [torch.from_numpy(interpreter.get_tensor(index)) for index in wanted]

    return model


class HandDetector:
    """Finds hands in frames; a frame's answer doesn't depend on the others.

    Args:
        folder: of the two models, see `fetch`.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_model`.
    """

    def __init__(self, folder: Path):
        self.palm, self.landmarks = load_model(folder / PALM), load_model(folder / LANDMARKS)

    def read(self, images: torch.Tensor, name: str = "hand detector") -> list[list[Hand]]:
        """The hands in each frame, the likeliest first.

        Args:
            images: (N, 3, H, W) float in [-1, 1].
            name: of the progress bar.
        """
        frames = (images.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
        return [self.read_frame(frame) for frame in tqdm(frames, desc=name, mininterval=5)]

    def read_frame(self, frame: torch.Tensor) -> list[Hand]:
        """The hands in a frame (3, H, W) float in [0, 1], the likeliest first."""
        size = torch.tensor([frame.shape[-1], frame.shape[-2]])
        scores, palms = [], []
        for view in views(*frame.shape[-2:]):
            values, logits = self.palm(cut(frame, view, PALM_SIZE, "zeros"))
            found, points = decode_palms(values[0], logits[0, :, 0])
            scores.append(found)
            palms.append(view.pixels(points))
        hands = []
        for score, palm in list(zip(*suppress(torch.cat(scores), torch.cat(palms)), strict=True))[:MOST_HANDS]:
            square = hand_square(palm)
            landmarks, presence, right, _ = self.landmarks(cut(frame, square, LANDMARK_SIZE, "border"))
            points = square.pixels(landmarks.reshape(21, 3)[:, :2] / LANDMARK_SIZE) / size
            x0, y0, x1, y1 = [*points.amin(0).tolist(), *points.amax(0).tolist()]
            hands.append(Hand(float(score), (x0, y0, x1, y1), float(presence), float(right)))
        return sorted(hands, key=lambda hand: -hand.presence)


def best_presence(hands: Sequence[Hand]) -> float:
    """Presence of the likeliest hand of a frame, 0 where there is no palm."""
    return max((hand.presence for hand in hands), default=0.0)


def in_same_place(hands: Sequence[Hand], true_hands: Sequence[Hand]) -> float:
    """1 if a found hand overlaps with one found in the true frame, 0 if none does, NaN if that frame has none."""
    found, wanted = (
        [torch.tensor(hand.box) for hand in some if hand.presence > FOUND] for some in (hands, true_hands)
    )
    if not wanted:
        return math.nan
    return float(any(box_overlap(box, true) >= SAME_PLACE for box in found for true in wanted))


def detector_measures(answers: Sequence[list[Hand]], true_answers: Sequence[list[Hand]]) -> dict[str, np.ndarray]:
    """The detector's measures of N frames.

    Args:
        answers: to the frames.
        true_answers: to the true frames.

    Returns:
        (N,) float for each of `DETECTED`: whether a hand is found, the presence of the likeliest one, and
        `in_same_place`.
    """
    scores = np.array([best_presence(hands) for hands in answers])
    places = [in_same_place(hands, true) for hands, true in zip(answers, true_answers, strict=True)]
    return {
        "detector_found": (scores > FOUND).astype(float),
        "detector_score": scores,
        "detector_place": np.array(places),
    }
