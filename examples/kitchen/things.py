"""Things in the kitchen, from simple parametric meshes.

Every maker takes a random generator (for colours and the like) and gives a `Thing` that stands or lies on z = 0 around
the origin. Tools run along x, the origin at the grip: a knife's blade, a spoon's bowl, a peeler's head are at x > 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .geom import Material, Part, box, ellipsoid, lathe, move, prism, spline, tube

STEEL = Material((0.62, 0.64, 0.67), gloss=0.5)
DARK = Material((0.07, 0.07, 0.08), gloss=0.25)
WHITE = Material((0.86, 0.85, 0.82), gloss=0.2)
WOOD = Material((0.62, 0.40, 0.20), (0.50, 0.30, 0.14), "wood")
WATER = Material((0.62, 0.82, 0.95), gloss=0.5, glow=0.25)
MILK = Material((0.93, 0.92, 0.88))
GREEN = Material((0.25, 0.5, 0.16))
PORCELAIN = Material((0.85, 0.83, 0.78), gloss=0.2)

COLOURS = {
    "red": (0.80, 0.12, 0.10),
    "blue": (0.10, 0.30, 0.70),
    "yellow": (0.92, 0.62, 0.08),
    "green": (0.12, 0.50, 0.25),
    "white": (0.85, 0.84, 0.80),
    "purple": (0.45, 0.18, 0.50),
    "teal": (0.10, 0.50, 0.55),
    "coral": (0.92, 0.42, 0.30),
}


@dataclass
class Thing:
    """A thing and how a hand takes it."""

    name: str
    parts: list[Part]
    radius: float = 0.04  # metres from the axis to where the hand closes
    grip_height: float = 0.05  # metres
    height: float = 0.1  # metres
    held: str = "side"  # side, rim, handle, tool or top (from above)
    colour: str = ""  # name of the colour that a description mentions
    lid: list[Part] | None = None
    handle: tuple[float, float, float] | None = None  # grip point on a handle


def pick(rng: Generator, allowed: tuple[str, ...] = tuple(COLOURS)) -> tuple[tuple[float, float, float], str]:
    """One of the named colours: its value and its name."""
    name = allowed[int(rng.choice(len(allowed)))]
    return COLOURS[name], name


def cup(rng: Generator) -> Thing:
    colour, name = pick(rng)
    radius, height = 0.041, 0.095
    wall = [(0, 0), (radius * 0.8, 0), (radius, 0.012), (radius, height), (radius - 0.005, height)]
    profile = [*wall, (radius - 0.006, 0.012), (0, 0.010)]
    return Thing("cup", [lathe(profile, Material(colour, gloss=0.25), 20)], radius, 0.05, height, "side", name)


def bowl(rng: Generator) -> Thing:
    colour, name = pick(rng)
    outside = [(0, 0), (0.04, 0), (0.062, 0.018), (0.080, 0.045), (0.088, 0.068)]
    inside = [(0.088, 0.068), (0.084, 0.068), (0.074, 0.042), (0.055, 0.018), (0, 0.010)]
    glaze = Material(colour, gloss=0.25)  # inside too: from above little else of a bowl is seen
    parts = [lathe(outside, glaze, 24), lathe(inside, glaze, 24)]
    return Thing("bowl", parts, 0.084, 0.045, 0.068, "rim", name)


def plate(rng: Generator) -> Thing:
    colour, name = pick(rng, ("blue", "green", "white", "teal", "coral"))
    rim = [(0, 0), (0.07, 0), (0.125, 0.018), (0.125, 0.021), (0.085, 0.008)]
    glaze = Material(colour, gloss=0.25)
    parts = [lathe(rim, glaze, 28), lathe([(0.087, 0.009), (0, 0.006)], glaze, 28)]
    return Thing("plate", parts, 0.118, 0.016, 0.02, "rim", name)


def bottle(rng: Generator) -> Thing:
    colour, name = pick(rng, ("red", "blue", "yellow", "green", "purple"))
    body = [(0, 0), (0.036, 0), (0.038, 0.006), (0.038, 0.15), (0.030, 0.185), (0.014, 0.215), (0.014, 0.25)]
    parts = [
        lathe(body, Material(colour, gloss=0.45), 18),
        lathe([(0.0388, 0.05), (0.0388, 0.12)], Material((0.9, 0.88, 0.8)), 18),
        lathe([(0.017, 0.245), (0.017, 0.268), (0, 0.268)], Material((0.9, 0.9, 0.88), gloss=0.2), 14),
    ]
    return Thing("bottle", parts, 0.038, 0.10, 0.268, "side", name)


def milk(rng: Generator) -> Thing:
    blue = Material((0.15, 0.35, 0.75))
    gable = prism([(-0.036, 0.17), (0.036, 0.17), (0.004, 0.215), (-0.004, 0.215)], 0.072, blue)
    parts = [
        box((-0.036, -0.036, 0), (0.036, 0.036, 0.17), Material((0.88, 0.89, 0.90))),
        box((-0.0365, -0.0365, 0.05), (0.0365, 0.0365, 0.10), blue),
        gable,
    ]
    return Thing("milk", parts, 0.036, 0.10, 0.215, "side", "white")


def pan(rng: Generator) -> Thing:
    colour, name = ((0.10, 0.10, 0.11), "black") if rng.random() < 0.7 else ((0.62, 0.14, 0.10), "red")
    outside = lathe(
        [(0, 0), (0.10, 0), (0.122, 0.042), (0.118, 0.042), (0.098, 0.006), (0, 0.005)],
        Material(colour, gloss=0.3),
        26,
    )
    stick = [(0, -0.118, 0.036), (0, -0.18, 0.050), (0, -0.29, 0.060)]
    parts = [outside, tube(stick, [0.010, 0.012, 0.013], DARK, 10, squash=0.75)]
    return Thing("pan", parts, 0.013, 0.055, 0.045, "handle", name, handle=(0, -0.235, 0.055))


def pot(rng: Generator) -> Thing:
    colour, name = ((0.60, 0.62, 0.65), "steel") if rng.random() < 0.5 else pick(rng, ("red", "blue", "green", "teal"))
    metal = Material(colour, gloss=0.4)
    parts = [lathe([(0, 0), (0.098, 0), (0.102, 0.006), (0.102, 0.10), (0.097, 0.10), (0.096, 0.008)], metal, 26)]
    for s in (-1, 1):
        ear = [(s * 0.10, -0.03, 0.08), (s * 0.13, -0.02, 0.085), (s * 0.13, 0.02, 0.085), (s * 0.10, 0.03, 0.08)]
        parts.append(tube(spline(ear, 4), 0.007, DARK, 8))
    soup = [(0.75, 0.35, 0.10), (0.45, 0.55, 0.18), (0.70, 0.60, 0.30)][int(rng.integers(3))]
    parts.append(lathe([(0.096, 0.065), (0, 0.066)], Material(soup, gloss=0.3), 24))
    lid = [
        lathe([(0.104, 0), (0.104, 0.006), (0.06, 0.024), (0.012, 0.030)], metal, 26),
        lathe([(0.010, 0.028), (0.010, 0.042), (0.020, 0.046), (0.018, 0.058), (0, 0.060)], DARK, 14),
    ]
    return Thing("pot", parts, 0.10, 0.08, 0.10, "rim", name, lid=lid)


def knife(rng: Generator) -> Thing:
    blade = [(0.045, 0.012), (0.20, 0.012), (0.225, -0.004), (0.19, -0.022), (0.045, -0.024)]
    parts = [
        prism(blade, 0.0035, Material((0.80, 0.82, 0.85), gloss=0.6)),
        tube([(-0.065, 0, 0), (-0.02, 0, -0.003), (0.05, 0, 0)], [0.012, 0.013, 0.011], DARK, 10, squash=0.7),
    ]
    return Thing("knife", parts, 0.013, 0.0, 0.01, "tool")


def spoon(rng: Generator) -> Thing:
    wood = Material((0.70, 0.48, 0.26))
    parts = [tube([(-0.10, 0, 0), (0.13, 0, 0)], [0.007, 0.006], wood, 8)]
    return Thing(
        "spoon", parts + move([ellipsoid(0.034, 0.023, 0.008, wood)], None, (0.155, 0, 0)), 0.008, 0, 0.01, "tool"
    )


def peeler(rng: Generator) -> Thing:
    parts = [
        tube([(-0.06, 0, 0), (0.04, 0, 0)], 0.010, Material((0.10, 0.50, 0.30), gloss=0.2), 8),
        box((0.045, -0.022, -0.003), (0.065, 0.022, 0.003), STEEL),
    ]
    return Thing("peeler", parts, 0.011, 0, 0.01, "tool")


def jar(rng: Generator) -> Thing:
    content = [(0.70, 0.25, 0.10), (0.55, 0.12, 0.16), (0.80, 0.58, 0.16), (0.40, 0.48, 0.15)][int(rng.integers(4))]
    lid_colour, _ = pick(rng, ("red", "blue", "yellow", "green"))
    outside = [(0, 0), (0.038, 0), (0.041, 0.006), (0.041, 0.085), (0.034, 0.098), (0.034, 0.108)]
    inside = [(0.030, 0.108), (0.030, 0.09), (0, 0.088)]
    parts = [
        lathe(outside + inside, Material(content, gloss=0.5), 20),
        lathe([(0.0416, 0.025), (0.0416, 0.07)], Material((0.92, 0.90, 0.82)), 20),
    ]
    lid = [lathe([(0.037, 0), (0.037, 0.02), (0.034, 0.023), (0, 0.023)], Material(lid_colour, gloss=0.3), 20)]
    return Thing("jar", parts, 0.041, 0.05, 0.108, "side", lid=lid)


def sponge(rng: Generator) -> Thing:
    parts = [
        box((-0.05, -0.032, 0), (0.05, 0.032, 0.024), Material((0.92, 0.75, 0.15))),
        box((-0.05, -0.032, 0.024), (0.05, 0.032, 0.034), Material((0.15, 0.42, 0.20))),
    ]
    return Thing("sponge", parts, 0.02, 0.017, 0.034, "top")


def cloth(rng: Generator) -> Thing:
    colour, name = pick(rng, ("red", "blue", "green", "teal"))
    parts = [box((-0.075, -0.06, 0), (0.075, 0.06, 0.012), Material((0.86, 0.85, 0.80), colour, "stripes", 4))]
    return Thing("cloth", parts, 0.01, 0.01, 0.012, "top", name)


def carrot(rng: Generator, start: float = -0.10, end: float = 0.08) -> Thing:
    """The stretch of a carrot from `start` to `end` along x, thick end at -x."""

    def radius(x: float) -> float:
        return 0.019 - 0.010 * (x + 0.10) / 0.18

    middle = (start + end) / 2
    path = [(start, 0, 0.017), (middle, 0, 0.017), (end, 0, 0.017)]
    parts = [tube(path, [radius(start), radius(middle), radius(end)], Material((0.92, 0.42, 0.06)), 14)]
    if start <= -0.10:
        parts.append(tube([(start + 0.003, 0, 0.017), (start - 0.02, 0.006, 0.022)], [0.009, 0.003], GREEN, 7))
    return Thing("carrot", parts, 0.018, 0.017, 0.034, "top")


def cucumber(rng: Generator, start: float = -0.10, end: float = 0.09) -> Thing:
    """The stretch of a cucumber from `start` to `end` along x."""
    skin = Material((0.16, 0.42, 0.14), (0.30, 0.55, 0.22), "speckle", 0.6, 0.15)
    path = [(start, 0, 0.021), ((start + end) / 2, 0, 0.021), (end, 0, 0.021)]
    return Thing("cucumber", [tube(path, [0.020, 0.021, 0.019], skin, 14)], 0.02, 0.02, 0.042, "top")


def bread(rng: Generator, start: float = -0.10, end: float = 0.10) -> Thing:
    """The stretch of a loaf from `start` to `end` along x."""
    x = np.linspace(start, end, 7)
    path, radii = np.stack([x, 0 * x, 0 * x + 0.038], 1), 0.047 * (1 - 0.25 * (np.abs(x) / 0.1) ** 4)
    crust = Material((0.72, 0.43, 0.18), (0.60, 0.33, 0.12), "wood", 0.3)
    return Thing("bread", [tube(path, radii, crust, 16, squash=0.8)], 0.04, 0.04, 0.075, "top")


def apple(rng: Generator) -> Thing:
    kinds = [((0.75, 0.10, 0.08), "red"), ((0.45, 0.62, 0.12), "green"), ((0.85, 0.65, 0.12), "yellow")]
    colour, name = kinds[int(rng.integers(3))]
    flesh = move([ellipsoid(0.036, 0.036, 0.033, Material(colour, gloss=0.25))], None, (0, 0, 0.033))
    return Thing(
        "apple", [*flesh, tube([(0, 0, 0.062), (0.004, 0, 0.076)], 0.0025, WOOD, 6)], 0.036, 0.033, 0.066, "side", name
    )


def egg(rng: Generator) -> Thing:
    parts = move([ellipsoid(0.022, 0.022, 0.029, Material((0.88, 0.72, 0.56)))], None, (0, 0, 0.022))
    return Thing("egg", parts, 0.022, 0.022, 0.05, "top")


def salt(rng: Generator) -> Thing:
    parts = [
        lathe([(0, 0), (0.022, 0), (0.019, 0.06)], Material((0.85, 0.86, 0.88), gloss=0.4), 16),
        lathe([(0.020, 0.06), (0.018, 0.082), (0, 0.086)], STEEL, 16),
    ]
    return Thing("salt", parts, 0.02, 0.04, 0.086, "side")


def butter(rng: Generator) -> Thing:
    parts = [
        box((-0.06, -0.04, 0), (0.06, 0.04, 0.008), WHITE),
        box((-0.04, -0.025, 0.008), (0.04, 0.025, 0.038), Material((0.95, 0.82, 0.35))),
    ]
    return Thing("butter", parts, 0.03, 0.02, 0.038, "top")


def toast(rng: Generator) -> Thing:
    parts = [
        box((-0.055, -0.05, 0), (0.055, 0.05, 0.016), Material((0.80, 0.58, 0.30))),
        box((-0.048, -0.043, 0.0155), (0.048, 0.043, 0.0166), Material((0.90, 0.74, 0.48))),
    ]
    return Thing("toast", parts, 0.03, 0.01, 0.016, "top")


def board(rng: Generator) -> Thing:
    kinds = [
        ((0.66, 0.45, 0.24), (0.56, 0.36, 0.17)),
        ((0.80, 0.62, 0.40), (0.70, 0.52, 0.31)),
        ((0.45, 0.28, 0.15), (0.36, 0.21, 0.10)),
    ]
    light, dark = kinds[int(rng.integers(3))]
    parts = [box((-0.20, -0.13, 0), (0.20, 0.13, 0.018), Material(light, dark, "wood", 1.2))]
    return Thing("board", parts, height=0.018)


def plant(rng: Generator) -> Thing:
    flower = Material(pick(rng, ("red", "yellow", "purple", "coral"))[0])
    vase = [(0, 0), (0.035, 0), (0.048, 0.08), (0.044, 0.08), (0.03, 0.06)]
    parts = [lathe(vase, Material((0.70, 0.38, 0.22)), 16)]
    for number in range(7):
        angle, reach = rng.uniform(0, 6.28), rng.uniform(0.02, 0.055)
        top = np.array([reach * np.cos(angle), reach * np.sin(angle), rng.uniform(0.12, 0.20)])
        parts.append(tube([(0, 0, 0.06), top], 0.004, GREEN, 5))
        parts += move([ellipsoid(0.02, 0.02, 0.014, flower if number % 2 else GREEN, 8, 5)], None, top)
    return Thing("plant", parts, height=0.2)


MAKERS = {
    "cup": cup,
    "bowl": bowl,
    "plate": plate,
    "bottle": bottle,
    "milk": milk,
    "pan": pan,
    "pot": pot,
    "knife": knife,
    "spoon": spoon,
    "peeler": peeler,
    "jar": jar,
    "sponge": sponge,
    "cloth": cloth,
    "carrot": carrot,
    "cucumber": cucumber,
    "bread": bread,
    "apple": apple,
    "egg": egg,
    "salt": salt,
    "butter": butter,
    "toast": toast,
    "board": board,
    "plant": plant,
}
