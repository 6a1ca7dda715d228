"""Hands and bare forearms: a rigged mesh posed by linear blend skinning, on a two-bone arm.

Hand frame: the origin is the wrist joint, -z runs along the fingers, +y out of the back of the hand (the palm faces
-y), and the thumb is at -x of the right hand and +x of the left one. The meshes are the generic hands of the WebXR
input profiles (MIT, `assets/`). Their glb files are read here because mesh libraries drop the skin (joints, weights).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .geom import Material, Part, rotation, spline, tube, unit

SIDES = ("right", "left")
FINGERS = ("thumb", "index-finger", "middle-finger", "ring-finger", "pinky-finger")
BONES = ("metacarpal", "phalanx-proximal", "phalanx-intermediate", "phalanx-distal", "tip")
UPPER_ARM, FOREARM = 0.31, 0.27  # metres
PALM = 0.016  # metres from the wrist's axis to the palm's surface


@dataclass(frozen=True)
class Grasp:
    """Flexion of the joints in degrees."""

    thumb: tuple[float, float, float]  # spread towards the palm, base, end
    index: tuple[float, float, float]  # knuckle, middle, end; so for the others
    middle: tuple[float, float, float]
    ring: tuple[float, float, float]
    pinky: tuple[float, float, float]

    @property
    def fingers(self) -> tuple[tuple[float, float, float], ...]:
        """The four fingers in the order of `FINGERS`."""
        return self.index, self.middle, self.ring, self.pinky


GRASPS = {
    "relaxed": Grasp((5, 5, 10), (18, 22, 12), (22, 26, 14), (26, 30, 16), (30, 32, 18)),
    "flat": Grasp((-8, 0, 5), (4, 4, 2), (3, 4, 2), (4, 4, 2), (6, 6, 3)),
    "wide": Grasp((14, 4, 12), (34, 34, 22), (34, 36, 24), (36, 38, 24), (38, 40, 26)),
    "wrap": Grasp((22, 16, 22), (48, 52, 34), (50, 56, 36), (52, 58, 38), (54, 58, 38)),
    "fist": Grasp((26, 34, 34), (68, 88, 56), (70, 92, 58), (72, 92, 58), (74, 90, 58)),
    "hook": Grasp((10, 18, 20), (34, 84, 44), (34, 88, 46), (36, 88, 46), (38, 86, 44)),
    "pinch": Grasp((24, 14, 26), (54, 42, 20), (58, 46, 24), (54, 52, 30), (50, 52, 30)),
    "claw": Grasp((20, 12, 22), (38, 58, 40), (40, 60, 42), (42, 60, 42), (44, 60, 42)),
}


@dataclass
class Grip:
    """Where and how one hand holds something."""

    point: np.ndarray  # (3,) metres, centre of what lies in the hand
    fingers: np.ndarray  # (3,) direction that the fingers point to
    palm: np.ndarray  # (3,) direction that the palm faces
    grasp: str  # a name in GRASPS
    radius: float  # metres from the palm's surface to the held axis
    follow: float  # 0 to 1, how far the hand turns into line with the forearm
    reach: float  # metres from the wrist to the grip point along the fingers


_TYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class HandMesh:
    """One skinned hand as its glb file holds it: V vertices, F faces, J joints."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        (length,) = struct.unpack("<I", data[12:16])
        header, binary = json.loads(data[20 : 20 + length]), data[20 + length + 8 :]

        def read(number: int) -> np.ndarray:
            accessor = header["accessors"][number]
            view = header["bufferViews"][accessor["bufferView"]]
            start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
            width, count = _WIDTHS[accessor["type"]], accessor["count"]
            values = np.frombuffer(binary, _TYPES[accessor["componentType"]], count * width, start)
            return values.reshape(count, width) if width > 1 else values

        primitive = header["meshes"][0]["primitives"][0]
        attributes = primitive["attributes"]
        skin = header["skins"][0]
        weights = read(attributes["WEIGHTS_0"])
        self.vertices = read(attributes["POSITION"]).astype(float)  # (V, 3)
        self.normals = read(attributes["NORMAL"]).astype(float)  # (V, 3)
        self.faces = read(primitive["indices"]).astype(int).reshape(-1, 3)  # (F, 3)
        self.joints = read(attributes["JOINTS_0"]).astype(int)  # (V, 4)
        self.weights = weights.astype(float)  # (V, 4), sum 1
        if weights.dtype != np.float32:
            self.weights /= self.weights.sum(1, keepdims=True)
        inverse = read(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        self.inverse_bind = inverse.astype(float)  # (J, 4, 4)
        self.bind = np.linalg.inv(self.inverse_bind)
        self.index = {header["nodes"][node]["name"]: i for i, node in enumerate(skin["joints"])}

    def chain(self, finger: str) -> list[int]:
        """Joints of a finger from the wrist outwards (the thumb has one fewer)."""
        return [self.index[name] for name in (f"{finger}-{bone}" for bone in BONES) if name in self.index]


@cache
def hand_mesh(side: str) -> HandMesh:
    """The mesh of the "right" or "left" hand."""
    return HandMesh(Path(__file__).parent / "assets" / f"{side}.glb")


@cache
def posed(side: str, grasp: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and normals (V, 3) of a hand in a grasp, in the hand frame."""
    mesh, angles = hand_mesh(side), GRASPS[grasp]
    wrist = mesh.index["wrist"]
    mirror = 1 if side == "right" else -1
    placed = {wrist: mesh.bind[wrist]}
    for number, finger in enumerate(FINGERS):
        parent = wrist
        for depth, joint in enumerate(mesh.chain(finger)):
            turn = np.eye(4)
            if finger == "thumb":
                spread, base, end = angles.thumb
                if depth == 0:
                    turn[:3, :3] = (
                        rotation("y", -mirror * spread * 0.6)
                        @ rotation("z", mirror * spread * 0.9)
                        @ rotation("x", -base * 0.5)
                    )
                elif depth <= 2:
                    turn[:3, :3] = rotation("x", -(base if depth == 1 else end))
            elif 1 <= depth <= 3:
                turn[:3, :3] = rotation("x", -angles.fingers[number - 1][depth - 1])
            placed[joint] = placed[parent] @ (np.linalg.inv(mesh.bind[parent]) @ mesh.bind[joint]) @ turn
            parent = joint
    to_wrist = np.linalg.inv(mesh.bind[wrist])
    bones = np.stack([to_wrist @ placed[i] @ mesh.inverse_bind[i] for i in range(len(mesh.bind))])
    blend = np.einsum("vk,vkab->vab", mesh.weights, bones[mesh.joints])
    vertices = np.einsum("vab,vb->va", blend, np.c_[mesh.vertices, np.ones(len(mesh.vertices))])[:, :3]
    return vertices, unit(np.einsum("vab,vb->va", blend[:, :3, :3], mesh.normals))


def hand_frame(fingers, palm) -> np.ndarray:
    """Rotation (3, 3) of the hand frame for a finger direction and, as far as it is square to it, a palm direction."""
    along = unit(fingers)
    normal = unit(np.asarray(palm, float) - (np.asarray(palm) @ along) * along)
    back, rear = -normal, -along
    return np.stack([np.cross(back, rear), back, rear], 1)


def elbow(shoulder, wrist, side: str) -> np.ndarray:
    """Elbow (3,) of the two-bone arm between shoulder and wrist; it drops down and outward."""
    towards = np.asarray(wrist) - shoulder
    direction = unit(towards)
    length = np.clip(np.linalg.norm(towards), 0.08, (UPPER_ARM + FOREARM) * 0.995)
    along = (length * length + FOREARM * FOREARM - UPPER_ARM * UPPER_ARM) / (2 * length)
    height = np.sqrt(max(FOREARM * FOREARM - along * along, 0))
    pole = np.array([0.75 if side == "right" else -0.75, -0.25, -0.62])
    pole = unit(pole - (pole @ direction) * direction)
    return np.asarray(wrist) - along * direction + height * pole


def hand_parts(side: str, grip: Grip, shoulder: np.ndarray, skin: Material) -> list[Part]:
    """Hand and bare forearm, named hand_right or hand_left.

    Args:
        side: "right" or "left".
        grip: where and how it holds.
        shoulder: (3,) metres.
        skin: material of hand and arm.
    """
    point = np.asarray(grip.point, float)
    rough_elbow = elbow(shoulder, point - unit(grip.fingers) * 0.08, side)
    fingers = unit(unit(grip.fingers) * (1 - grip.follow) + unit(point - rough_elbow) * grip.follow)
    frame = hand_frame(fingers, grip.palm)
    wrist = point - frame @ np.array([0, -(PALM + grip.radius), -grip.reach])
    elbow_point = elbow(shoulder, wrist, side)
    forearm = unit(wrist - elbow_point)
    name = f"hand_{side}"
    vertices, normals = posed(side, grip.grasp)
    hand = Part(vertices @ frame.T + wrist, hand_mesh(side).faces, normals @ frame.T, vertices, skin, name)
    back = frame[:, 2]
    path = spline(
        [
            wrist - back * 0.012,
            wrist + back * 0.035 * 0.6 - forearm * 0.02,
            elbow_point * 0.5 + wrist * 0.5,
            elbow_point,
        ],
        5,
    )
    radii = 0.0265 + 0.016 * np.clip(np.linspace(0, 1, len(path)) * 1.6, 0, 1)
    return [hand, tube(path, radii, skin, 14, name=name)]
