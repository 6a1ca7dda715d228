"""What lies between the two frames of a pair: the scene at any moment of its action, for clips.

Parts of the two stages that have the same shape are the same thing moved: the rigid motion between them is found from
their vertices and carried out as a screw, so that doors turn about their hinges. A hand first reaches for what will
move, then goes along with it. What is in one stage alone (water, slices, crumbs) comes or goes in mid-motion. The two
ends are the stages of the pair; the cook's head sways all the while.
"""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from dataclasses import replace

import numpy as np

from .geom import Part, rotation, unit
from .hand import SIDES, Grip, hand_parts
from .raytrace import Camera
from .scene import SHOULDER, Scene

RIGID = 1e-4  # metres by which a moved part's vertices may miss its rigid motion
IN_HAND = 0.10  # metres from a grip to the thing that it holds, at most
OUT_OF_VIEW = 0.30  # metres that a hand which is absent in one stage lies below its place in the other
SWAY = (0.004, 0.004, 0.003)  # metres of the eye, right, up and forward
NOD = 0.5  # degrees of the gaze


class Screw:
    """The rigid motion that takes points (N, 3) to other points, in parts.

    Attributes:
        error: largest distance in metres by which it misses.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray):
        centre_1, centre_2 = first.mean(0), second.mean(0)
        u, _, v = np.linalg.svd((first - centre_1).T @ (second - centre_2))
        turn = v.T @ np.diag([1, 1, np.sign(np.linalg.det(v.T @ u.T))]) @ u.T
        self.shift = centre_2 - turn @ centre_1
        self.error = float(np.abs(first @ turn.T + self.shift - second).max())
        cosine = np.clip((np.trace(turn) - 1) / 2, -1, 1)
        self.degrees = float(np.degrees(np.arccos(cosine)))
        skew = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
        if np.linalg.norm(skew) < 1e-6:  # no turn, or half a one, whose axis the symmetric part has
            symmetric = (turn + np.eye(3)) / 2
            skew = symmetric[:, int(np.argmax(np.diag(symmetric)))]
        self.axis = unit(skew)
        self.along = self.axis * (self.axis @ self.shift)
        self.point = np.linalg.pinv(np.eye(3) - turn) @ (self.shift - self.along)  # on the axis

    def at(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Rotation (3, 3) and shift (3,) of a share of the motion, 0 to 1."""
        if self.degrees < 0.5:
            return np.eye(3), share * self.shift
        turn = rotation(self.axis, share * self.degrees)
        return turn, self.point - turn @ self.point + share * self.along

    def back_from_end(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Rotation and shift that take what stands at the end of the motion to where it is at a share of it."""
        (turn, shift), (end_turn, end_shift) = self.at(share), self.at(1.0)
        turn = turn @ end_turn.T
        return turn, shift - turn @ end_shift


class Moving:
    """A scene between its stages."""

    def __init__(self, scene: Scene):
        self.scene = scene
        first, second = ([part for part in parts if not _is_hand(part)] for parts in scene.parts)
        self.still, self.moved, self.gone, self.new = match(first, second)
        held = [pair for pair in self.moved if pair[1].name in scene.shot.active] or self.moved
        self.carrier = {}  # motion of what a hand holds, by side
        for side, grip in scene.grips[1].items():
            near = min(held, key=lambda pair: _distance(pair[1], grip.point), default=None)
            if near is not None and _distance(near[1], grip.point) < IN_HAND:
                self.carrier[side] = near[2]
        self.phases = np.random.default_rng([11, scene.kitchen, len(scene.action)]).uniform(0, 2 * np.pi, 5)

    def parts(self, reach: float, motion: float) -> list[Part]:
        """All parts at a moment.

        Args:
            reach: 0 to 1, how far hands have come from where they rest to what they reach for.
            motion: 0 to 1, how far things have moved.
        """
        parts = self.still + (self.new if motion >= 0.5 else self.gone)
        for before, _, screw in self.moved:
            parts = [*parts, before.moved(*screw.at(motion))]
        return parts + self._hands(reach, motion)

    def camera(self, progress: float, seconds: float) -> Camera:
        """The camera at a share of the head's motion and a time, which sets the sway."""
        first, second = self.scene.cameras
        camera = copy(first)
        swing = np.sin(np.array([1.1, 1.7, 0.8, 1.4, 0.9]) * 2 * np.pi * 0.5 * seconds + self.phases)
        axes = _blend(first.axes, second.axes, progress)
        camera.axes = axes @ rotation(axes[0], NOD * swing[3]).T @ rotation(axes[1], NOD * swing[4]).T
        camera.position = first.position + progress * (second.position - first.position) + (SWAY * swing[:3]) @ axes
        return camera

    def _hands(self, reach: float, motion: float) -> list[Part]:
        before, during = self.scene.grips
        parts: list[Part] = []
        down = -self.scene.cameras[0].axes[1] * OUT_OF_VIEW
        for side in SIDES:
            start, end = before.get(side), during.get(side)
            share = motion if side in self.scene.shot.before.hands else reach
            if end is None:
                if start is None:
                    continue
                end = replace(start, point=start.point + down)
            else:
                screw = self.carrier.get(side)
                turn, shift = screw.back_from_end(motion) if screw else (np.eye(3), np.zeros(3))
                end = replace(end, point=turn @ end.point + shift, fingers=turn @ end.fingers, palm=turn @ end.palm)
            if start is None:
                start = replace(end, point=end.point + down)
            parts += self._hand(side, start, end, share)
        return parts

    def _hand(self, side: str, start: Grip, end: Grip, share: float) -> list[Part]:
        """A hand between two grips: the pose between, shaped between the two grasps."""
        x, y, z = SHOULDER
        shoulder = self.scene.cameras[0].position + [x if side == "right" else -x, y, z]
        smooth = share * share * (3 - 2 * share)
        mixed = {
            name: (1 - smooth) * np.asarray(getattr(start, name)) + smooth * np.asarray(getattr(end, name))
            for name in ("point", "fingers", "palm", "radius", "follow", "reach")
        }
        shapes = [
            hand_parts(side, replace(start, grasp=grip.grasp, **mixed), shoulder, self.scene.skin)
            for grip in (start, end)
        ]
        return [
            replace(
                first,
                vertices=(1 - smooth) * first.vertices + smooth * second.vertices,
                normals=unit((1 - smooth) * first.normals + smooth * second.normals),
            )
            for first, second in zip(*shapes, strict=True)
        ]


def match(
    first: list[Part], second: list[Part]
) -> tuple[list[Part], list[tuple[Part, Part, Screw]], list[Part], list[Part]]:
    """Parts of two stages as those that stay, those that move (both and the motion), those that go and that come."""
    waiting = defaultdict(list)
    for part in second:
        waiting[_content(part)].append(part)
    still, rest = [], []
    for part in first:
        same = waiting[_content(part)]
        if same:
            same.pop()
            still.append(part)
        else:
            rest.append(part)
    left = {id(part) for parts in waiting.values() for part in parts}
    later = [part for part in second if id(part) in left]
    moved, gone = [], []
    for part in rest:
        for other in later:
            if other.name == part.name and other.vertices.shape == part.vertices.shape:
                screw = Screw(part.vertices, other.vertices)
                if screw.error < RIGID:
                    later = [one for one in later if one is not other]
                    moved.append((part, other, screw))
                    break
        else:
            gone.append(part)
    return still, moved, gone, later


def _content(part: Part) -> tuple:
    return part.name, part.vertices.shape, part.vertices.tobytes(), part.material.colour, part.material.glow


def _is_hand(part: Part) -> bool:
    return part.name.startswith("hand_")


def _distance(part: Part, point: np.ndarray) -> float:
    """Metres from a point to the box around a part, 0 inside it."""
    low, high = part.vertices.min(0), part.vertices.max(0)
    return float(np.linalg.norm(np.maximum(np.maximum(low - point, point - high), 0)))


def _blend(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Axes (3, 3) between two cameras' axes, which are near one another."""
    right, _, forward = (1 - share) * first + share * second
    forward = unit(forward)
    right = unit(right - (right @ forward) * forward)
    return np.stack([right, np.cross(right, forward), forward])
