"""One pair from a seed: who stands where in which kitchen and does what, and the two frames with all that is known.

`sample(seed, index, ...)` depends on nothing but its arguments, so a data set is a seed and a range of indices.
`SPLITS` are the settled data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .actions import ACTIONS, HELD_OUT_ACTIONS, TRAIN_ACTIONS, Shot
from .geom import Material, Part
from .hand import SIDES, Grip, hand_parts
from .raytrace import Camera, trace
from .room import Kitchen

SKIN = [
    (0.86, 0.64, 0.50),
    (0.78, 0.55, 0.40),
    (0.66, 0.44, 0.30),
    (0.52, 0.33, 0.22),
    (0.38, 0.24, 0.16),
    (0.82, 0.58, 0.48),
]
# Eye and gaze point, x from where the cook stands, in metres; the fridge is seen from its hinge's side.
VIEWS = {
    "counter": ((0, -0.22, 1.44), (0, 0.235, 0.935)),
    "drawer": ((0, -0.56, 1.36), (0, -0.06, 0.83)),
    "cupboard": ((0, -0.55, 1.47), (0, 0.30, 1.56)),
    "fridge": ((-0.12, -0.95, 1.42), (-0.13, 0, 1.13)),
}
VIEW_SPREAD = [0.015, 0.012, 0.012, 0.015, 0.015, 0.8]  # eye x y z, gaze x y (metres), roll (degrees)
MOTION_SPREAD = [0.012, 0.010, 0.010, 0.018, 0.014, 0.008, 0.9]  # eye x y z, gaze x y z (metres), roll (degrees)
SHOULDER = (0.19, -0.04, -0.27)  # metres from the eye to the right shoulder
SMALLEST_BOX = 6  # pixels that a thing must show to get a box


@dataclass(frozen=True)
class Split:
    """A settled data set: its seed, its own kitchens and its actions."""

    seed: int
    first_kitchen: int
    kitchens: int
    actions: tuple[str, ...]


SPLITS = {
    "train": Split(1, 0, 256, TRAIN_ACTIONS),
    "val": Split(2, 100_000, 64, TRAIN_ACTIONS + HELD_OUT_ACTIONS),
    "test": Split(3, 200_000, 128, TRAIN_ACTIONS + HELD_OUT_ACTIONS),
}


@dataclass
class Scene:
    """A pair before it is rendered."""

    action: str
    kitchen: int
    shot: Shot
    parts: tuple[list[Part], list[Part]]  # before, during
    cameras: tuple[Camera, Camera]
    hands: tuple[list[str], list[str]]  # sides that are there, in view or not
    grips: tuple[dict[str, Grip], dict[str, Grip]]  # of these hands, by side
    skin: Material  # of the cook


@lru_cache(maxsize=256)
def kitchen(number: int) -> Kitchen:
    """The kitchen of that number, kept for the next pair."""
    return Kitchen(number)


def build(
    seed: int,
    index: int,
    *,
    kitchens: int = 256,
    first_kitchen: int = 0,
    actions: tuple[str, ...] = TRAIN_ACTIONS,
    motion: float = 0.0,
    hands_seen: float = 1.0,
    show_hands: bool = True,
) -> Scene:
    """Set up a pair.

    Args:
        seed, index: all that is random follows from these two.
        kitchens, first_kitchen: draw among this many kitchens, counted from the first one. A kitchen has one cook.
        actions: labels to draw from; the order counts.
        motion: head motion between the frames; 1 is about 1.2 cm of the eye and 2 cm of the gaze point.
        hands_seen: share of the pairs whose first frame shows the resting hands, so that skin is known from it.
        show_hands: False leaves the hands out of the second frame (an unsuitable pair, see `render`).

    Raises:
        ValueError: an unknown action.
    """
    unknown = [action for action in actions if action not in ACTIONS]
    if unknown or not actions:
        raise ValueError(f"`actions` must be among {', '.join(ACTIONS)}; got {', '.join(unknown) or 'none'}.")
    rng = np.random.default_rng([seed, index])
    action = actions[int(rng.integers(len(actions)))]
    number = first_kitchen + int(rng.integers(kitchens))
    room = kitchen(number)
    skin = Material(SKIN[int(np.random.default_rng([5, number]).integers(len(SKIN)))], gloss=0.06)
    shot = Shot(room, rng)
    ACTIONS[action](shot)
    eye, gaze, roll = _view(shot)
    shift = rng.normal(size=7) * MOTION_SPREAD * motion
    cameras = (Camera(eye, gaze, roll=roll), Camera(eye + shift[:3], gaze + shift[3:6], roll=roll + shift[6]))
    resting = _resting_hands(rng, cameras[0], hands_seen)
    hands = (shot.before.hands or resting, shot.during.hands if show_hands else {})
    before, during = (
        room.build(near=shot.station, **stage.state) + stage.parts + _bodies(grips, eye, skin)
        for stage, grips in zip((shot.before, shot.during), hands, strict=True)
    )
    return Scene(action, number, shot, (before, during), cameras, (sorted(hands[0]), sorted(hands[1])), hands, skin)


def sample(seed: int, index: int, *, size: int = 128, samples: int = 2, **options) -> dict:
    """Render a pair.

    Args:
        seed, index: see `build`.
        size: pixels along a side of the frames.
        samples: sub-samples along a side of a pixel.
        options: the other arguments of `build`.

    Returns:
        before, target: (size, size, 3) uint8 frames.
        label: the action; description: the sentence; slots: verb, noun, station, hand, place, grasp, motion.
        boxes_before, boxes_target: name -> [x0, y0, x1, y1] in fractions of the frame, for the visible hands
            (hand_right, hand_left) and the visible things that the action is about.
        hands_before, hands_target: the sides of the hands, in view or not.
        kitchen, seed, index.
    """
    return {**shoot(build(seed, index, **options), size, samples), "seed": seed, "index": index}


def shoot(scene: Scene, size: int = 128, samples: int = 2) -> dict:
    """Render a scene that is set up; see `sample`, whose result this is without `seed` and `index`."""
    shot, action = scene.shot, ACTIONS[scene.action]
    wanted = {*shot.active, *(f"hand_{side}" for side in SIDES)}
    frames, boxes = [], []
    for parts, camera in zip(scene.parts, scene.cameras, strict=True):
        frame, part_map, names = trace(parts, camera, shot.kitchen.light, size, samples)
        frames.append(frame)
        boxes.append(visible_boxes(part_map, names, wanted))
    return {
        "before": frames[0],
        "target": frames[1],
        "label": scene.action,
        "description": shot.description,
        "slots": {"verb": action.verb, "noun": action.noun, "station": shot.station, **shot.slots},
        "boxes_before": boxes[0],
        "boxes_target": boxes[1],
        "kitchen": scene.kitchen,
        "hands_before": scene.hands[0],
        "hands_target": scene.hands[1],
    }


def _view(shot: Shot) -> tuple[np.ndarray, np.ndarray, float]:
    """Eye and gaze point (3,) and roll in degrees before the action."""
    x = shot.kitchen.x[shot.station] + shot.shift
    noise = shot.rng.normal(size=6) * VIEW_SPREAD
    eye, gaze = (np.array(point, float) for point in VIEWS[shot.view])
    if shot.view == "fridge":
        eye[0], gaze[0] = eye[0] * np.sign(x), gaze[0] * np.sign(x)
    return eye + [x, 0, 0] + noise[:3], gaze + [x + noise[3], noise[4], 0], noise[5]


def _resting_hands(rng: np.random.Generator, camera: Camera, share: float) -> dict[str, Grip]:
    """Grips of the hands that rest at the lower edge of the frame, one or both, in a share of the pairs."""
    is_seen = rng.random() < share
    sides = [side for side in SIDES if rng.random() < 0.8] or ["right"]
    offsets = rng.normal(size=(2, 3))
    grips = {}
    for side, offset in zip(SIDES, offsets, strict=True):
        if is_seen and side in sides:
            mirror = 1 if side == "right" else -1
            point = camera.point(mirror * (0.62 + 0.05 * offset[0]), -0.80 + 0.04 * offset[1], 0.46)
            fingers, palm = np.array([-0.28 * mirror, 0.85, -0.30]), np.array([-0.35 * mirror, -0.35, -0.85])
            grips[side] = Grip(point, fingers, palm, "relaxed", radius=0.02, follow=0.45, reach=0.085)
    return grips


def _bodies(grips: dict[str, Grip], eye: np.ndarray, skin: Material) -> list[Part]:
    """Parts of the cook's hands and arms."""
    parts = []
    for side, grip in grips.items():
        x, y, z = SHOULDER
        parts += hand_parts(side, grip, eye + [x if side == "right" else -x, y, z], skin)
    return parts


def visible_boxes(part_map: np.ndarray, names: list[str], wanted: set[str]) -> dict[str, list[float]]:
    """Boxes of the wanted parts that are visible in a (size, size) map of indices into `names`."""
    boxes, size = {}, len(part_map)
    for number, name in enumerate(names):
        if name in wanted:
            y, x = np.nonzero(part_map == number)
            if len(y) >= SMALLEST_BOX:
                edges = (x.min() / size, y.min() / size, (x.max() + 1) / size, (y.max() + 1) / size)
                boxes[name] = [round(float(edge), 4) for edge in edges]
    return boxes
