"""The kitchen itself, from a seed: a counter with three stations (sink, prep, hob), drawers, cupboards and a fridge.

Half of the kitchens are mirrored. What can change (drawers, doors, tap, hob plates) is an argument of `Kitchen.build`;
everything else is built once. Units and axes: see the package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import things
from .geom import Material, Part, box, lathe, move, rotation, spline, tube

COUNTER, DEPTH = 0.90, 0.62  # metres: height of the counter's top, y of the wall
STATION = 0.95  # metres: width of a station
STATIONS = ("sink", "prep", "hob")
COLUMN = 0.235  # metres from a station's middle to the middle of its left or right drawer
WATER_TAP = -48  # degrees by which the open tap's lever is turned

CABINETS = [
    (0.82, 0.80, 0.75),
    (0.36, 0.48, 0.52),
    (0.30, 0.42, 0.34),
    (0.72, 0.62, 0.48),
    (0.62, 0.66, 0.70),
    (0.48, 0.26, 0.22),
    (0.86, 0.78, 0.58),
    (0.24, 0.30, 0.42),
]
COUNTERS = [
    Material((0.74, 0.72, 0.68), (0.63, 0.61, 0.58), "speckle", 1.0, 0.15),
    Material((0.60, 0.40, 0.22), (0.52, 0.33, 0.17), "wood", 0.5, 0.1),
    Material((0.80, 0.79, 0.77), (0.66, 0.65, 0.64), "marble", 1.0, 0.2),
    Material((0.30, 0.31, 0.33), (0.36, 0.37, 0.39), "speckle", 1.0, 0.2),
    Material((0.66, 0.55, 0.44), (0.61, 0.50, 0.39), "speckle", 0.7, 0.15),
]
TILES = [
    ((0.82, 0.84, 0.84), (0.68, 0.70, 0.70)),
    ((0.56, 0.70, 0.72), (0.80, 0.82, 0.80)),
    ((0.78, 0.70, 0.58), (0.66, 0.58, 0.48)),
    ((0.70, 0.78, 0.66), (0.84, 0.86, 0.80)),
    ((0.80, 0.60, 0.52), (0.86, 0.80, 0.74)),
]
WALLS = [(0.80, 0.76, 0.68), (0.72, 0.76, 0.76), (0.82, 0.80, 0.78)]
FRIDGES = [(0.80, 0.82, 0.83), (0.50, 0.52, 0.55), (0.66, 0.24, 0.20)]
CLUTTER = ["bottle", "jar", "plant", "milk", "bowl", "bread", "salt", "apple"]
SHELVED = ["milk", "bottle", "jar", "bowl", "apple", "cup"]
# Hob plates: x from the station's middle, y, radius, in metres.
PLATES = [(-0.13, 0.22, 0.085), (-0.13, 0.41, 0.07), (0.13, 0.41, 0.085), (0.13, 0.22, 0.095)]


class Kitchen:
    """One kitchen: its layout, materials, light and clutter all follow from `seed`."""

    def __init__(self, seed: int):
        rng = np.random.default_rng([77, seed])
        self._built: dict[object, list[Part]] = {}
        side = -1 if rng.random() < 0.5 else 1
        self.x = {"sink": -STATION * side, "prep": 0.0, "hob": STATION * side, "fridge": (1.5 * STATION + 0.36) * side}
        colour = CABINETS[int(rng.integers(len(CABINETS)))]
        wooden = Material((0.62, 0.42, 0.24), (0.54, 0.35, 0.18), "wood", 0.8, 0.08)
        self.cabinet = Material(colour, gloss=0.08) if rng.random() < 0.7 else wooden
        self.counter = COUNTERS[int(rng.integers(len(COUNTERS)))]
        tile, joint = TILES[int(rng.integers(len(TILES)))]
        self.tiles = Material(tile, joint, "tiles", float(rng.choice([5.0, 6.0, 7.0])), 0.15)
        self.wall = Material(WALLS[int(rng.integers(3))])
        parquet = Material((0.50, 0.35, 0.22), (0.42, 0.29, 0.17), "wood", 0.4)
        stone = Material((0.60, 0.58, 0.55), (0.42, 0.41, 0.40), "tiles", 3)
        self.floor = parquet if rng.random() < 0.6 else stone
        self.handle = things.STEEL if rng.random() < 0.6 else things.DARK
        self.fridge = Material(FRIDGES[int(rng.choice(3, p=[0.5, 0.35, 0.15]))], gloss=0.3)
        self.inside = Material((0.80, 0.74, 0.64))
        self.clutter = [  # what stands at the back of the counter: thing, x from the station's middle, y, seed
            (
                str(rng.choice(CLUTTER)),
                float(rng.uniform(-0.36, 0.36)),
                float(rng.uniform(0.46, 0.54)),
                int(rng.integers(1 << 30)),
            )
            for _ in range(9)
        ]
        self.shelved = []  # what stands in cupboards and fridge: thing, seed
        for _ in range(12):
            thing = str(rng.choice(SHELVED))
            rng.uniform(-0.2, 0.2)  # drawn and not used: the settled kitchens depend on the order of draws
            self.shelved.append((thing, int(rng.integers(1 << 30))))
        warmth = float(rng.uniform(0, 1))
        strength = float(rng.uniform(0.66, 0.84))
        self.light = {
            "colour": np.array([1.0, 0.90 + 0.08 * warmth, 0.74 + 0.22 * warmth]) * strength,
            "position": (float(rng.uniform(-0.6, 0.6)), float(rng.uniform(-0.35, 0.05)), 2.5),
            "u": (0.8, 0, 0),
            "v": (0, 0.8, 0),
            "ambient": np.array([0.36, 0.37, 0.40]) * float(rng.uniform(0.8, 1.0)),
            "fill": 0.14,
        }

    def build(
        self,
        drawers: dict[tuple[str, int], float] | None = None,
        cupboard: tuple[str, int, float] | None = None,
        fridge: float = 0.0,
        tap: bool = False,
        hob: int | None = None,
        near: str = "prep",
    ) -> list[Part]:
        """All parts of the room in one state.

        Args:
            drawers: (station, column) -> metres that the drawer is pulled out; column 0 is the left one.
            cupboard: station, column and degrees of the one open upper door.
            fridge: degrees that the fridge's door is open.
            tap: whether water runs.
            hob: index in PLATES of the glowing plate.
            near: the station that the cook stands at; only its open drawer shows cutlery.
        """
        drawers = drawers or {}
        parts = list(self._once("shell", self._shell))
        parts += self._once(("tap", tap), self._tap, tap)
        parts += self._hob(hob)
        for station in STATIONS:
            for column in (0, 1):
                out = drawers.get((station, column), 0.0)
                if out > 0:
                    parts += self._drawer(station, column, out, station == near)
                else:
                    parts += self._once(("drawer", station, column), self._drawer, station, column)
        for station in ("prep", "hob"):
            for column in (0, 1):
                angle = cupboard[2] if cupboard and cupboard[:2] == (station, column) else 0.0
                if angle > 0:
                    parts += self._cupboard(station, column, angle)
                else:
                    parts += self._once(("cupboard", station, column), self._cupboard, station, column)
        parts += self._fridge(fridge) if fridge > 0 else self._once("fridge", self._fridge)
        return parts

    def tap_lever(self, on: bool) -> np.ndarray:
        """Where the tap's lever is gripped (3,)."""
        lever = np.array([0.085, 0, 0.02])
        if on:
            lever = rotation("z", WATER_TAP) @ rotation("y", -14) @ lever
        return np.array([self.x["sink"] + 0.012, 0.545, COUNTER + 0.085]) + lever

    def drawer_handle(self, station: str, column: int, out: float) -> np.ndarray:
        """Middle of a drawer's handle (3,) when it is `out` metres open."""
        return np.array([self.x[station] + (-COLUMN if column == 0 else COLUMN), -0.035 - out, 0.785])

    def cupboard_handle(self, station: str, column: int, angle: float) -> np.ndarray:
        """Middle of an upper door's handle (3,) at `angle` degrees."""
        s = 1 if column == 0 else -1
        hinge = self.x[station] - s * STATION / 2
        handle = np.array([s * (STATION / 2 - 0.05), -0.05, 1.525])
        return np.array([hinge, 0.30, 0]) + rotation("z", -s * angle) @ handle

    def fridge_handle(self, angle: float) -> np.ndarray:
        """Middle of the fridge's handle (3,) at `angle` degrees."""
        s = self.fridge_side()
        hinge = np.array([self.x["fridge"] - s * 0.32, 0.02, 0])
        return hinge + rotation("z", -s * angle) @ np.array([s * 0.58, -0.10, 1.18])

    def fridge_side(self) -> int:
        """Sign of x from the fridge's hinge to its handle; the handle is on the counter's side."""
        return -1 if self.x["fridge"] > 0 else 1

    def _once(self, key: object, make: Callable[..., list[Part]], *args) -> list[Part]:
        """Parts that don't depend on the state are built once."""
        if key not in self._built:
            self._built[key] = make(*args)
        return self._built[key]

    def _shell(self) -> list[Part]:
        """Floor, walls, counter with the sink, lower fronts, window, and the clutter at the back."""
        sink = self.x["sink"]
        left, right = -1.5 * STATION, 1.5 * STATION
        parts = [
            box((-3, -3, -0.02), (3, DEPTH, 0), self.floor),
            box((-3, DEPTH, 0), (3, DEPTH + 0.05, 2.7), self.wall),
            box((left, DEPTH - 0.008, COUNTER), (right, DEPTH, 1.40), self.tiles),
        ]
        x0, x1, y0, y1 = sink - 0.24, sink + 0.24, 0.11, 0.47  # the sink's hole
        below = COUNTER - 0.035
        for low, high in (
            ((left, 0), (x0, DEPTH)),
            ((x1, 0), (right, DEPTH)),
            ((x0, 0), (x1, y0)),
            ((x0, y1), (x1, DEPTH)),
        ):
            parts.append(box((*low, below), (*high, COUNTER), self.counter))
        floor, rim = COUNTER - 0.17, COUNTER + 0.003
        parts += [
            box((x0, y0, floor - 0.01), (x1, y1, floor), things.STEEL),
            box((x0 - 0.008, y0, floor), (x0, y1, rim), things.STEEL),
            box((x1, y0, floor), (x1 + 0.008, y1, rim), things.STEEL),
            box((x0, y0 - 0.008, floor), (x1, y0, rim), things.STEEL),
            box((x0, y1, floor), (x1, y1 + 0.008, rim), things.STEEL),
            lathe([(0.022, 0), (0, 0.001)], things.DARK, 14).moved(None, (sink, 0.29, floor)),
        ]
        behind = Material(tuple(np.array(self.cabinet.colour) * 0.45))
        for station in STATIONS:
            middle = self.x[station]
            for x in (middle - COLUMN, middle + COLUMN):
                parts.append(box((x - 0.228, 0.0, 0.10), (x + 0.228, 0.02, 0.66), self.cabinet))
                parts.append(tube([(x - 0.07, -0.03, 0.62), (x + 0.07, -0.03, 0.62)], 0.007, self.handle, 8))
            parts.append(box((middle - STATION / 2, 0.021, 0.06), (middle + STATION / 2, 0.04, below), behind))
        sky = Material((0.62, 0.80, 0.95), glow=0.75)
        parts += [
            box((sink - 0.40, DEPTH - 0.03, 1.35), (sink + 0.40, DEPTH, 2.1), things.WHITE),
            box((sink - 0.36, DEPTH - 0.034, 1.39), (sink + 0.36, DEPTH - 0.029, 2.06), sky),
            box((sink - 0.012, DEPTH - 0.045, 1.39), (sink + 0.012, DEPTH - 0.03, 2.06), things.WHITE),
        ]
        for number, (name, x, y, seed) in enumerate(self.clutter):
            station = STATIONS[number % 3]
            if station == "sink" and abs(x) < 0.10:
                x = 0.22
            if station == "hob":
                y = 0.56
                if name in ("bowl", "bread", "plant"):
                    continue
            parts += move(_thing(name, seed), None, (self.x[station] + x, y, COUNTER))
        return parts

    def _hob(self, glowing: int | None) -> list[Part]:
        """Hob, its plates and knobs."""
        middle = self.x["hob"]
        parts = [box((middle - 0.27, 0.10, COUNTER), (middle + 0.27, 0.52, COUNTER + 0.008), things.DARK)]
        for number, (x, y, radius) in enumerate(PLATES):
            hot = glowing == number
            ring = Material((1.0, 0.28, 0.05), glow=1.1) if hot else Material((0.24, 0.24, 0.25), gloss=0.1)
            disc = Material((0.55, 0.12, 0.03), glow=0.6) if hot else Material((0.13, 0.13, 0.14), gloss=0.2)
            profile = [(radius, 0), (radius, 0.002), (radius * 0.80, 0.003), (radius * 0.76, 0.001)]
            plate = [lathe(profile, ring, 24), lathe([(radius * 0.72, 0.0015), (0, 0.0016)], disc, 24)]
            parts += move(plate, None, (middle + x, y, COUNTER + 0.008), "hot plate" if hot else None)
        for number in range(len(PLATES)):
            knob = [
                lathe([(0.023, 0), (0.019, 0.024), (0, 0.025)], self.handle, 16),
                box((-0.003, 0.002, 0.0245), (0.003, 0.02, 0.028), things.WHITE),
            ]
            if glowing == number:
                knob = move(knob, rotation("z", -75), None, "knob")
            parts += move(knob, None, (middle - 0.165 + 0.11 * number, 0.052, COUNTER))
        return parts

    def _tap(self, on: bool) -> list[Part]:
        """Tap over the sink, with its water when it is on."""
        neck = [
            (0, 0.545, COUNTER),
            (0, 0.545, COUNTER + 0.20),
            (0, 0.50, COUNTER + 0.27),
            (0, 0.40, COUNTER + 0.27),
            (0, 0.345, COUNTER + 0.22),
        ]
        parts = [
            tube(spline(neck, 6), 0.013, things.STEEL, 12),
            lathe([(0.028, 0), (0.024, 0.02)], things.STEEL, 16).moved(None, (0, 0.545, COUNTER)),
        ]
        lever = [tube([(0, 0, 0), (0.035, 0, 0.010), (0.095, 0, 0.022)], [0.013, 0.010, 0.008], things.STEEL, 10)]
        turn = rotation("z", WATER_TAP) @ rotation("y", -14) if on else None
        parts += move(lever, turn, (0.012, 0.545, COUNTER + 0.085), "tap handle")
        if on:
            stream = [(0, 0.338, COUNTER + 0.215), (0, 0.333, COUNTER + 0.05), (0, 0.330, COUNTER - 0.168)]
            parts.append(tube(stream, [0.009, 0.008, 0.010], things.WATER, 10, name="water"))
            puddle = lathe([(0.07, 0.004), (0, 0.006)], things.WATER, 18, name="water")
            parts.append(puddle.moved(None, (0, 0.33, COUNTER - 0.168)))
        return move(parts, None, (self.x["sink"], 0, 0))

    def _drawer(self, station: str, column: int, out: float = 0.0, detail: bool = False) -> list[Part]:
        """One drawer, `out` metres open, with cutlery where `detail` is asked for."""
        x = self.x[station] + (-COLUMN if column == 0 else COLUMN)
        z0, z1 = 0.69, 0.86
        bar = [(x - 0.075, -0.035 - out, 0.785), (x + 0.075, -0.035 - out, 0.785)]
        parts = [
            box((x - 0.228, -out, z0), (x + 0.228, 0.02 - out, z1), self.cabinet),
            tube(bar, 0.008, self.handle, 8),
        ]
        for s in (-0.07, 0.07):
            parts.append(tube([(x + s, -out, 0.785), (x + s, -0.035 - out, 0.785)], 0.006, self.handle, 6))
        if out > 0:
            y0, y1 = 0.02 - out, 0.35
            parts += [
                box((x - 0.21, y0, z0 + 0.02), (x + 0.21, y1, z0 + 0.03), self.inside),
                box((x - 0.21, y0, z0 + 0.02), (x - 0.20, y1, z1 - 0.03), self.inside),
                box((x + 0.20, y0, z0 + 0.02), (x + 0.21, y1, z1 - 0.03), self.inside),
            ]
        if out > 0 and detail:
            for number in range(5):
                at = x - 0.15 + 0.075 * number
                cutlery = [(at, y0 + 0.06, z0 + 0.042), (at, y0 + 0.22, z0 + 0.042)]
                material = things.STEEL if number % 2 else things.WOOD
                parts.append(tube(cutlery, [0.012, 0.007], material, 8, squash=0.6))
        return move(parts, name="drawer" if out > 0 else "world")

    def _cupboard(self, station: str, column: int, angle: float = 0.0) -> list[Part]:
        """One upper cupboard, its door at `angle` degrees, with things on its shelves when it is open."""
        x0 = self.x[station] + (-STATION / 2 if column == 0 else 0)
        x1 = x0 + STATION / 2
        y0, z0, z1 = 0.30, 1.40, 2.05
        parts = [
            box((x0, y0, z0), (x0 + 0.015, DEPTH, z1), self.cabinet),
            box((x1 - 0.015, y0, z0), (x1, DEPTH, z1), self.cabinet),
            box((x0, y0, z0), (x1, DEPTH, z0 + 0.02), self.cabinet),
            box((x0, y0, z1), (x1, DEPTH, z1 + 0.02), self.cabinet),
            box((x0, DEPTH - 0.02, z0), (x1, DEPTH - 0.01, z1), self.inside),
            box((x0 + 0.015, y0 + 0.03, 1.70), (x1 - 0.015, DEPTH, 1.715), self.inside),
        ]
        if angle > 0:
            for shelf, z in enumerate((z0 + 0.02, 1.715)):
                for place in range(3):
                    name, seed = self.shelved[shelf * 3 + place]
                    at = (x0 + 0.10 + 0.135 * place, 0.42 + 0.03 * (place % 2), z)
                    parts += move(_thing("cup" if name == "apple" else name, seed), None, at)
        s = 1 if column == 0 else -1  # from the hinge into the door
        width, handle = s * (STATION / 2 - 0.006), s * (STATION / 2 - 0.05)
        door = [
            box((min(0, width), -0.022, z0), (max(0, width), 0, z1), self.cabinet),
            tube([(handle, -0.05, z0 + 0.05), (handle, -0.05, z0 + 0.20)], 0.008, self.handle, 8),
        ]
        for z in (z0 + 0.06, z0 + 0.19):
            door.append(tube([(handle, -0.02, z), (handle, -0.05, z)], 0.006, self.handle, 6))
        hinge = (x0 if column == 0 else x1, y0, 0)
        return parts + move(door, rotation("z", -s * angle), hinge, "cupboard door" if angle > 0 else "world")

    def _fridge(self, angle: float = 0.0) -> list[Part]:
        """The fridge, its door at `angle` degrees, lit and full when it is open."""
        middle = self.x["fridge"]
        x0, x1, y0, z1 = middle - 0.32, middle + 0.32, 0.02, 1.80
        white = Material((0.88, 0.90, 0.92), glow=0.25 if angle > 0 else 0)
        parts = [
            box((x0, y0, 0), (x0 + 0.03, DEPTH, z1), self.fridge),
            box((x1 - 0.03, y0, 0), (x1, DEPTH, z1), self.fridge),
            box((x0, y0, z1 - 0.03), (x1, DEPTH, z1), self.fridge),
            box((x0, DEPTH - 0.03, 0), (x1, DEPTH - 0.02, z1), white),
            box((x0, y0, 0), (x1, DEPTH, 0.08), self.fridge),
        ]
        for edge, inward in ((x0, 0.031), (x1, -0.031)):
            x = edge + inward
            low, high = min(x, x + inward * 0.1), max(x, x + inward * 0.1)
            parts.append(box((low, y0, 0.08), (high, DEPTH, z1 - 0.03), white))
        for shelf, z in enumerate((0.45, 0.80, 1.10, 1.42)):
            parts.append(box((x0 + 0.03, y0 + 0.06, z - 0.012), (x1 - 0.03, DEPTH - 0.03, z), white))
            if angle > 0:
                for place in range(3):
                    at = (middle - 0.19 + 0.19 * place, 0.20 + 0.1 * (place % 2), z)
                    parts += move(_thing(*self.shelved[shelf * 3 + place]), None, at)
        s = self.fridge_side()
        door = [
            box((min(0, s * 0.64), -0.055, 0.05), (max(0, s * 0.64), 0, z1), self.fridge),
            tube([(s * 0.58, -0.10, 1.0), (s * 0.58, -0.10, 1.40)], 0.011, self.handle, 8),
        ]
        for z in (1.02, 1.38):
            door.append(tube([(s * 0.58, -0.05, z), (s * 0.58, -0.10, z)], 0.009, self.handle, 6))
        door.append(box((min(s * 0.05, s * 0.58), 0, 0.2), (max(s * 0.05, s * 0.58), 0.012, 1.7), white))
        hinge = (middle - s * 0.32, y0, 0)
        return parts + move(door, rotation("z", -s * angle), hinge, "fridge door" if angle > 0 else "world")


def _thing(name: str, seed: int) -> list[Part]:
    """Parts of a thing that belongs to the kitchen."""
    return things.MAKERS[name](np.random.default_rng(seed)).parts
