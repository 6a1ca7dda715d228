"""What can happen in the kitchen: 45 actions, each a small function that sets two stages, before and during it.

A function moves things, opens doors, places hands and says in one sentence what the person does; the sentence is
composed from the same values that place the hands, so it is true by construction. `ACTIONS` is the table of them all.
Directions of hands are written for the right hand and mirrored in x for the left one. Units and axes: see the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from . import things
from .geom import Material, Part, align, box, ellipsoid, lathe, move, rotation, tube, unit
from .hand import Grip
from .room import COLUMN, COUNTER, PLATES, STATION, STATIONS, Kitchen
from .things import Thing

Pose = tuple[tuple[float, float, float], tuple[float, float, float]]  # directions of the fingers and of the palm
SIDE: Pose = ((-0.45, 0.85, -0.15), (-0.88, -0.47, 0))
OVER: Pose = ((-0.25, 0.74, -0.62), (-0.05, -0.62, -0.78))
BAR: Pose = ((-0.08, 0.78, -0.62), (0, -0.60, -0.80))
UPRIGHT_BAR: Pose = ((-0.30, 0.92, 0.0), (-0.95, -0.30, 0))
HANDLE: Pose = ((-0.72, 0.48, -0.40), (-0.35, -0.10, -0.93))
TOOL: Pose = ((-0.38, 0.62, -0.66), (-0.72, -0.10, -0.55))
RIM: Pose = ((-0.55, 0.72, -0.35), (-0.78, -0.55, -0.25))

SPOKEN = {"milk": "milk carton", "salt": "salt shaker"}  # names that a description words differently


class Stage:
    """What is seen at one moment, besides the room: parts, hands, and the room's state."""

    def __init__(self):
        self.parts: list[Part] = []
        self.hands: dict[str, Grip] = {}  # by side
        self.state: dict = {}  # arguments of Kitchen.build

    def put(self, thing: Thing, position, turn=None, name: str | None = None, parts: list[Part] | None = None) -> None:
        """Place a thing (or only some of its parts) under its own or another name."""
        self.parts += move(parts or thing.parts, turn, position, name or thing.name)

    def grip(
        self, side: str, point, pose: Pose, grasp: str, radius=0.015, follow=0.35, reach=0.085, turn=None
    ) -> None:
        """Place a hand; `turn` rotates the pose. The other arguments are those of `hand.Grip`."""
        mirror = 1 if side == "right" else -1
        fingers, palm = (np.array([v[0] * mirror, v[1], v[2]]) for v in pose)
        if turn is not None:
            fingers, palm = turn @ fingers, turn @ palm
        self.hands[side] = Grip(np.asarray(point, float), fingers, palm, grasp, radius, follow, reach)

    def hold(self, side: str, thing: Thing, position, turn=None) -> str:
        """Place a thing in a hand the way it asks for, and give the words for how it is held."""
        mirror = 1 if side == "right" else -1
        turn = np.eye(3) if turn is None else turn
        position = np.asarray(position, float)
        self.put(thing, position, turn)
        on_axis = position + turn @ [0, 0, thing.grip_height]
        if thing.held == "side":
            grasp = "wide" if thing.radius > 0.03 else "wrap"
            tilt = None if np.allclose(turn, np.eye(3)) else turn
            self.grip(side, on_axis, SIDE, grasp, thing.radius, turn=tilt)
            return "around its side"
        if thing.held == "rim":
            rim = position + turn @ [mirror * thing.radius, -0.01, thing.grip_height]
            self.grip(side, rim, RIM, "pinch", 0.006, reach=0.10)
            return "by the rim"
        if thing.held == "handle":
            self.grip(side, position + turn @ np.array(thing.handle), HANDLE, "wrap", 0.013, 0.25)
            return "by the handle"
        if thing.held == "tool":
            self.grip(side, position, TOOL, "fist", 0.012)
            return "by the handle"
        self.grip(side, on_axis, OVER, "claw", thing.radius, reach=0.09)
        return "from above"


class Shot:
    """One action being set up: kitchen, random numbers, the two stages, the words and the view."""

    def __init__(self, kitchen: Kitchen, rng: Generator):
        self.kitchen, self.rng = kitchen, rng
        self.before, self.during = Stage(), Stage()
        self.view = "counter"  # a key of scene.VIEWS
        self.station = "prep"  # where the cook stands
        self.shift = 0.0  # metres that the cook stands beside the station's middle
        self.active: list[str] = []  # names of the parts that the action is about
        self.description = ""
        self.slots: dict[str, str] = {}

    def uniform(self, low: float, high: float) -> float:
        """One uniform draw."""
        return float(self.rng.uniform(low, high))

    def at(self, x: float, y: float, z: float = 0.0) -> np.ndarray:
        """Point (3,) on the counter, x from the station's middle."""
        return np.array([self.kitchen.x[self.station] + x, y, COUNTER + z])

    def make(self, name: str) -> Thing:
        """A new thing."""
        return things.MAKERS[name](self.rng)

    def put(self, thing: Thing, position, turn=None, name: str | None = None) -> None:
        """Place a thing that stays where it is."""
        self.before.put(thing, position, turn, name)
        self.during.put(thing, position, turn, name)

    def bystander(self, kinds: tuple[str, ...], y: tuple[float, float] = (0.36, 0.42)) -> None:
        """Place one more thing, of one of these kinds, at the back of the counter."""
        name = str(self.rng.choice(kinds, 1)[0])
        self.put(self.make(name), self.at(self.uniform(-0.34, 0.34), self.uniform(*y)), name=f"other {name}")

    def front_plate(self) -> tuple[float, float]:
        """Stand at the hob and choose one of its two front plates: x, y."""
        self.station = "hob"
        x, y, _ = PLATES[int(self.rng.choice([0, 3]))]
        return x, y

    def say(self, description: str, *, hand: str, place: str, grasp: str, motion: str) -> None:
        """Set description and slots."""
        self.description = description
        self.slots = {"hand": hand, "place": place, "grasp": grasp, "motion": motion}


@dataclass(frozen=True)
class Action:
    """An entry of the table: the label's two parts and the function that sets the shot."""

    verb: str
    noun: str
    stage: Callable[..., None]
    options: dict = field(default_factory=dict)

    def __call__(self, shot: Shot) -> None:
        self.stage(shot, **self.options)


BYSTANDERS = ("bottle", "jar", "salt", "milk")


def side_of(x: float) -> str:
    """Words for an x from the station's middle."""
    return "left" if x < -0.09 else "right" if x > 0.09 else "middle"


def on_counter(x: float) -> str:
    """Where on the counter, in words."""
    return "in the middle of the counter" if side_of(x) == "middle" else f"on the {side_of(x)} of the counter"


def coloured(thing: Thing, name: str) -> str:
    """Name with the thing's colour, where it has one."""
    return f"{thing.colour} {name}" if thing.colour else name


def lay(shot: Shot, name: str, x_range: tuple[float, float]) -> tuple[Thing, np.ndarray, np.ndarray, str, float]:
    """Choose where a thing lies on the counter: thing, position, rotation, the hand that takes it, x."""
    thing = shot.make(name)
    x = shot.uniform(*x_range)
    turn = np.eye(3)
    y, z = shot.uniform(0.20, 0.30), 0.0
    if name == "pan":
        turn, y = rotation("z", shot.uniform(-25, 35)), y + 0.06
    if thing.held == "tool":
        turn = rotation("z", shot.uniform(55, 125))
        z, y = 0.014, y - 0.03
    side = "right" if (thing.held in ("handle", "tool") and x > -0.12) or x > -0.04 else "left"
    return thing, shot.at(x, y, z), turn, side, x


def take(shot: Shot, name: str) -> None:
    thing, position, turn, side, x = lay(shot, name, (-0.24, 0.24))
    shot.before.put(thing, position, turn)
    lifted = position + [-0.25 * x, -0.05, shot.uniform(0.10, 0.14)]
    how = shot.during.hold(side, thing, lifted, turn @ rotation("y", -12) if thing.held == "tool" else turn)
    if name == "plate":
        other, mirror = ("left", -1) if side == "right" else ("right", 1)
        rim = lifted + [mirror * thing.radius, -0.01, thing.grip_height]
        shot.during.grip(other, rim, RIM, "pinch", 0.006, reach=0.10)
        side = "both"
    shot.active += [name]
    shot.bystander(BYSTANDERS)
    hands = "both hands" if side == "both" else f"the {side} hand"
    what = coloured(thing, SPOKEN.get(name, name))
    shot.say(
        f"With {hands} I grip the {what} {on_counter(x)} {how} and lift it up toward me.",
        hand=side,
        place=side_of(x),
        grasp=how,
        motion="lift",
    )


def put(shot: Shot, name: str) -> None:
    thing, position, turn, side, x = lay(shot, name, (-0.2, 0.22))
    if name == "pan":
        x, y = shot.front_plate()
        position, turn = shot.at(x, y, 0.012), rotation("z", shot.uniform(-10, 25))
        side = "right"
        carried = shot.at(0.05, 0.18, 0.20)
    else:
        carried = shot.at(0.10 if side == "right" else -0.10, 0.0, 0.17)
    shot.before.hold(side, thing, carried, turn)
    how = shot.during.hold(side, thing, position + [0, 0, 0.012], turn)
    shot.active += [name]
    if name != "pan":
        shot.bystander(BYSTANDERS)
    what = coloured(thing, SPOKEN.get(name, name))
    where = "on the hob" if name == "pan" else on_counter(x)
    shot.say(
        f"I hold the {what} {how} with the {side} hand and set it down {where}.",
        hand=side,
        place=side_of(x),
        grasp=how,
        motion="set down",
    )


def drawer(shot: Shot, opening: bool) -> None:
    shot.view = "drawer"
    shot.station = str(shot.rng.choice(STATIONS))
    column = int(shot.rng.integers(2))
    shot.shift = (-COLUMN if column == 0 else COLUMN) * shot.uniform(0.35, 0.75)
    out = shot.uniform(0.14, 0.20)
    shot.before.state["drawers"] = {} if opening else {(shot.station, column): shot.uniform(0.28, 0.33)}
    shot.during.state["drawers"] = {(shot.station, column): out}
    handle = shot.kitchen.drawer_handle(shot.station, column, out)
    side = "left" if column == 0 else "right"
    if opening:
        shot.during.grip(side, handle, BAR, "hook", 0.010, 0.3)
        shot.say(
            f"With the {side} hand I grip the handle of the {side} drawer and pull it toward me.",
            hand=side,
            place=side,
            grasp="hooked over the handle",
            motion="pull",
        )
    else:
        push = ((-0.12, 0.62, 0.55), (0, 0.66, -0.72))
        shot.during.grip(side, handle + [0.03, 0.01, 0.02], push, "flat", 0.012, 0.1)
        shot.say(
            f"With the flat {side} hand I push the front of the {side} drawer to close it.",
            hand=side,
            place=side,
            grasp="flat against the front",
            motion="push",
        )
    shot.active += ["drawer"]
    if shot.station == "prep":
        shot.bystander(("cup", "jar", "bottle", "apple"), (0.2, 0.4))


def cupboard(shot: Shot, opening: bool) -> None:
    shot.view = "cupboard"
    shot.station = str(shot.rng.choice(["prep", "hob"]))
    column = int(shot.rng.integers(2))
    shot.shift = (-STATION / 4 if column == 0 else STATION / 4) * shot.uniform(0.5, 0.9)
    angle = shot.uniform(38, 55)
    shot.before.state["cupboard"] = None if opening else (shot.station, column, shot.uniform(85, 100))
    shot.during.state["cupboard"] = (shot.station, column, angle)
    side, place = ("right", "left") if column == 0 else ("left", "right")
    handle = shot.kitchen.cupboard_handle(shot.station, column, angle)
    shot.during.grip(side, handle, ((-0.30, 0.80, 0.42), (-0.90, -0.42, 0.1)), "hook", 0.010, 0.25)
    shot.active += ["cupboard door"]
    if opening:
        words = f"I reach up with the {side} hand, grip the handle of the {place} cupboard door and swing it open."
    else:
        words = f"I reach up with the {side} hand to the handle of the {place} cupboard door and swing it shut."
    motion = "swing open" if opening else "swing shut"
    shot.say(words, hand=side, place=place, grasp="around the handle", motion=motion)


def fridge(shot: Shot, opening: bool) -> None:
    shot.view, shot.station = "fridge", "fridge"
    angle = shot.uniform(34, 52)
    shot.before.state["fridge"] = 0.0 if opening else shot.uniform(85, 100)
    shot.during.state["fridge"] = angle
    side = "right" if shot.kitchen.fridge_side() > 0 else "left"
    shot.during.grip(side, shot.kitchen.fridge_handle(angle), UPRIGHT_BAR, "hook", 0.011, 0.3)
    shot.active += ["fridge door"]
    do = "pull the door open" if opening else "push the door shut"
    shot.say(
        f"With the {side} hand I hold the fridge handle and {do}.",
        hand=side,
        place=side,
        grasp="around the handle",
        motion="pull" if opening else "push",
    )


def tap(shot: Shot, on: bool) -> None:
    shot.station = "sink"
    shot.before.state["tap"], shot.during.state["tap"] = not on, on
    lever = shot.kitchen.tap_lever(on) + [0, -0.005, 0.008]
    shot.during.grip("right", lever, ((-0.40, 0.80, -0.30), (-0.70, -0.45, -0.50)), "pinch", 0.006, 0.3, reach=0.10)
    standing = shot.make(str(shot.rng.choice(["cup", "bowl"])))
    shot.put(standing, shot.at(shot.uniform(-0.10, -0.04), 0.24, -0.168), name="other")
    shot.active += ["tap handle", "water"]
    do, water = ("lift and turn", "starts to run") if on else ("push back", "stops")
    shot.say(
        f"With the right hand I {do} the tap lever and the water {water}.",
        hand="right",
        place="middle",
        grasp="pinching the lever",
        motion="turn",
    )


def hob(shot: Shot, on: bool) -> None:
    shot.station = "hob"
    knob = int(shot.rng.integers(4))
    shot.before.state["hob"], shot.during.state["hob"] = (None, knob) if on else (knob, None)
    side = "left" if knob < 1 else "right"
    pose = ((-0.30, 0.60, -0.74), (-0.35, -0.66, -0.55))
    shot.during.grip(side, shot.at(-0.165 + 0.11 * knob, 0.050, 0.022), pose, "pinch", 0.012, 0.25, reach=0.105)
    x, y, _ = PLATES[(knob + 2) % 4]
    shot.put(shot.make("pot"), shot.at(x, y, 0.012), name="other pot")
    shot.active += ["knob", "hot plate"]
    glow = "begins to glow" if on else "goes dark"
    shot.say(
        f"With the {side} hand I turn knob {knob + 1} of the hob and the plate {glow}.",
        hand=side,
        place=f"knob {knob + 1}",
        grasp="pinching the knob",
        motion="turn",
    )


def cut(shot: Shot, name: str) -> None:
    middle = shot.uniform(-0.10, 0.10)
    board = shot.make("board")
    shot.put(board, shot.at(middle, 0.24), rotation("z", shot.uniform(-5, 5)))
    seed = int(shot.rng.integers(1 << 30))

    def piece(**stretch: float) -> Thing:
        return things.MAKERS[name](np.random.default_rng(seed), **stretch)

    x, y, z = middle - 0.02, 0.25, board.height
    knife = shot.make("knife")
    is_long = name != "apple"
    blade = shot.uniform(-0.01, 0.035) if is_long else 0.0  # x of the cut along the food
    shot.before.put(piece(), shot.at(x, y, z))
    shot.before.put(knife, shot.at(middle + 0.24, 0.20, 0.014), rotation("z", shot.uniform(80, 100)))
    if is_long:
        shot.during.put(piece(end=blade), shot.at(x, y, z))
        number, start = 0, blade + 0.014
        while start + 0.009 < 0.085:
            slice_ = piece(start=start, end=start + 0.008)
            shot.during.put(slice_, shot.at(x + 0.012 * (number + 1), y + 0.006 * (-1) ** number, z))
            start, number = start + 0.016, number + 1
        knife_x = x + blade + 0.004
    else:
        shot.during.put(piece(), shot.at(x, y, z))
        knife_x = x
    thickness = {"apple": 0.062, "bread": 0.055}.get(name, 0.022)
    held = shot.at(knife_x, 0.115, z + thickness + 0.012)
    shot.during.put(knife, held, rotation("z", 91) @ rotation("y", 4))
    shot.during.grip("right", held + [0.0, -0.012, 0.0], TOOL, "fist", 0.010, 0.3)
    holding = shot.at(x - (0.075 if is_long else 0.030), 0.25, z + (0.03 if is_long else 0.035))
    pose = ((-0.35, 0.72, -0.60), (-0.15, -0.62, -0.76))
    shot.during.grip("left", holding, pose, "claw", 0.016, 0.3, reach=0.095)
    shot.active += [name, "knife"]
    shot.say(
        f"I hold the {name} on the cutting board with the left hand and cut it with the knife in my right hand.",
        hand="both",
        place=side_of(middle),
        grasp="knife handle",
        motion="cut down",
    )


def pour(shot: Shot, source: str, vessel: str) -> None:
    x = shot.uniform(-0.14, 0.04)
    target = shot.make(vessel)
    position = shot.at(x, shot.uniform(0.22, 0.28))
    shot.put(target, position)
    thing = shot.make(source)
    shot.before.put(thing, shot.at(x + shot.uniform(0.18, 0.26), shot.uniform(0.2, 0.28)))
    turn = rotation("y", -shot.uniform(98, 112))
    mouth = position + [0.012, 0, target.height + 0.075]
    base = mouth - turn @ np.array([0, 0, thing.height])
    shot.during.put(thing, base, turn)
    grip = base + turn @ np.array([0, 0, thing.grip_height])
    shot.during.grip("right", grip, SIDE, "wide", thing.radius, 0.3, turn=turn)
    liquid, material = ("water", things.WATER) if source == "bottle" else ("milk", things.MILK)
    stream = [mouth, mouth + [-0.012, 0, -0.02], position + [-0.004, 0, target.height * 0.3]]
    shot.during.parts.append(tube(stream, [0.007, 0.006, 0.005], material, 8, name="stream"))
    if vessel == "cup":
        shot.during.grip("left", position + [0, 0, target.grip_height], SIDE, "wide", target.radius)
    else:
        rim = position + [-target.radius, -0.01, min(target.grip_height, 0.05)]
        shot.during.grip("left", rim, RIM, "pinch", 0.006)
    shot.active += [source, vessel, "stream"]
    container = "bottle" if source == "bottle" else "carton"
    shot.say(
        f"I hold the {target.colour} {vessel} with the left hand and tilt the {container} in my right hand "
        f"so that {liquid} runs into it.",
        hand="both",
        place=side_of(x),
        grasp="around its side",
        motion="tilt",
    )


def stir(shot: Shot, name: str) -> None:
    spoon, vessel = shot.make("spoon"), shot.make(name)
    if name == "pot":
        x, y = shot.front_plate()
        position = shot.at(x, y, 0.012)
        resting = shot.at(0.36, 0.20, 0.014)
    else:
        x = shot.uniform(-0.12, 0.12)
        position = shot.at(x, shot.uniform(0.22, 0.28))
        resting = shot.at(x + 0.19, 0.20, 0.014)
    shot.put(vessel, position)
    shot.before.put(spoon, resting, rotation("z", 85))
    dipped = position + [shot.uniform(-0.03, 0.0), 0.01, 0.055]
    grip = dipped + [0.055, -0.045, 0.155]
    shot.during.put(spoon, grip, align((1, 0, 0), unit(dipped - grip)))
    pose = ((-0.50, 0.55, -0.45), (-0.68, -0.35, -0.55))
    shot.during.grip("right", grip, pose, "pinch", 0.008, 0.3, reach=0.10)
    rim = position + [-vessel.radius - (0.02 if name == "pot" else 0), -0.01, vessel.grip_height]
    shot.during.grip("left", rim, RIM, "pinch", 0.006, 0.35, reach=0.10)
    shot.active += [name, "spoon"]
    shot.say(
        f"With the left hand I steady the {vessel.colour} {name} and with the right hand I stir in it "
        "with the wooden spoon.",
        hand="both",
        place=side_of(x),
        grasp="pinching the spoon",
        motion="circle",
    )


def pot_lid(shot: Shot, opening: bool) -> None:
    pot = shot.make("pot")
    x, y = shot.front_plate()
    position = shot.at(x, y, 0.012)
    shot.put(pot, position)
    knob, tilt = [0, 0, 0.055], rotation("y", 14)
    if opening:
        shot.before.put(pot, position + [0, 0, pot.height], None, "pot lid", pot.lid)
        lid = position + [0.03, -0.02, pot.height + 0.10]
    else:
        carried = position + [0.10, -0.12, 0.17]
        shot.before.put(pot, carried, tilt, "pot lid", pot.lid)
        shot.before.grip("right", carried + tilt @ knob, OVER, "claw", 0.014, 0.3, reach=0.095)
        lid = position + [0.03 * 0.55, -0.02, pot.height + 0.10 * 0.55]
    shot.during.put(pot, lid, tilt, "pot lid", pot.lid)
    shot.during.grip("right", lid + tilt @ knob, OVER, "claw", 0.014, 0.3, reach=0.095)
    shot.active += ["pot", "pot lid"]
    shot.say(
        f"With the right hand I {'lift the lid off' if opening else 'set the lid on'} the pot.",
        hand="right",
        place=side_of(x),
        grasp="on the lid from above",
        motion="lift off" if opening else "set on",
    )


def jar_lid(shot: Shot, opening: bool) -> None:
    jar = shot.make("jar")
    x = shot.uniform(-0.14, 0.12)
    position = shot.at(x, shot.uniform(0.20, 0.27))
    shot.put(jar, position)
    on_jar, tilt = 0.090, rotation("y", 14)
    resting = position + ([0, 0, on_jar] if opening else [0.16, -0.02, 0])
    shot.before.put(jar, resting, None, "jar lid", jar.lid)
    lift = 1 if opening else 0.55
    lid = position + [0.03 * lift, -0.02, on_jar + 0.055 * lift]
    shot.during.put(jar, lid, tilt, "jar lid", jar.lid)
    shot.during.grip("right", lid + tilt @ [0, 0, 0.012], OVER, "claw", 0.020, 0.3, reach=0.095)
    shot.during.grip("left", position + [0, 0, 0.05], SIDE, "wide", jar.radius)
    shot.active += ["jar", "jar lid"]
    do = "lift the lid off" if opening else "put the lid on and turn it"
    shot.say(
        f"I hold the jar with the left hand and with the right hand I {do}.",
        hand="both",
        place=side_of(x),
        grasp="on the lid from above",
        motion="lift off" if opening else "set on",
    )


def wash(shot: Shot, name: str) -> None:
    shot.station = "sink"
    shot.before.state["tap"], shot.during.state["tap"] = False, True
    thing = shot.make(name)
    shot.before.put(thing, shot.at(shot.uniform(-0.10, 0.10), 0.24, -0.165))
    under_tap = shot.at(-0.02, 0.315, -0.02)
    if name == "bowl":
        position, turn = under_tap + [0, -0.02, -0.03], rotation("x", 38) @ rotation("y", -20)
        shot.during.put(thing, position, turn)
        rim = position + turn @ np.array([-thing.radius, 0, thing.grip_height])
        shot.during.grip("left", rim, RIM, "pinch", 0.006, 0.3, reach=0.10)
    elif name == "cup":
        turn = rotation("x", 38) @ rotation("y", -20)
        shot.during.hold("left", thing, under_tap + [-0.01, -0.01, -0.02], turn)
    else:
        shot.during.hold("left", thing, under_tap + [-0.02, 0, 0.0], rotation("z", -20))
    sponge = shot.make("sponge")
    if name == "carrot":
        pose = ((-0.55, 0.70, -0.40), (-0.65, -0.45, -0.60))
        shot.during.grip("right", under_tap + [0.05, 0.0, 0.02], pose, "wrap", 0.018, 0.3)
        tool = "with the fingers of the right hand"
    else:
        shot.before.put(sponge, shot.at(0.30, 0.20))
        scrubbing = under_tap + [0.055, -0.02, 0.015]
        shot.during.put(sponge, scrubbing, rotation("z", 60) @ rotation("y", 50))
        pose = ((-0.55, 0.66, -0.45), (-0.70, -0.45, -0.50))
        shot.during.grip("right", scrubbing + [0.01, 0, 0.02], pose, "claw", 0.022, 0.3, reach=0.09)
        tool = "with the sponge in my right hand"
        shot.active += ["sponge"]
    shot.active += [name, "water"]
    what = coloured(thing, name)
    shot.say(
        f"I hold the {what} under the running tap with the left hand and scrub it {tool}.",
        hand="both",
        place="middle",
        grasp="held under water",
        motion="scrub",
    )


def wash_hands(shot: Shot) -> None:
    shot.station = "sink"
    shot.before.state["tap"] = shot.during.state["tap"] = True
    fingers = (-0.55, 0.78, -0.25)
    right, left = shot.at(0.030, 0.325, -0.02), shot.at(-0.030, 0.33, -0.035)
    shot.during.grip("right", right, (fingers, (-0.72, -0.55, -0.30)), "relaxed", 0.010, 0.25)
    shot.during.grip("left", left, (fingers, (-0.72, -0.55, -0.15)), "relaxed", 0.010, 0.25)
    shot.active += ["water"]
    shot.say(
        "I hold both hands under the running water and rub them together.",
        hand="both",
        place="middle",
        grasp="open",
        motion="rub",
    )


def wipe(shot: Shot) -> None:
    cloth = shot.make("cloth")
    x = shot.uniform(-0.2, 0.2)
    sauce = [(0.45, 0.16, 0.05), (0.15, 0.30, 0.10), (0.50, 0.10, 0.10)][int(shot.rng.integers(3))]
    material = Material(sauce, gloss=0.5)
    drops = [
        (x + shot.uniform(-0.13, 0.13), 0.24 + shot.uniform(-0.05, 0.07), shot.uniform(0.012, 0.030)) for _ in range(6)
    ]
    side, mirror = ("right", 1) if x > -0.1 else ("left", -1)
    for drop_x, drop_y, radius in drops:
        drop = lathe([(radius, 0), (radius * 0.9, 0.002), (0, 0.003)], material, 14, name="spill")
        drop = drop.moved(None, shot.at(drop_x, drop_y))
        shot.before.parts.append(drop)
        if (drop_x - x) * mirror < 0.0:  # not wiped yet
            shot.during.parts.append(drop)
    shot.before.put(cloth, shot.at(x + mirror * 0.25, 0.19), rotation("z", 10))
    pressed = shot.at(x + mirror * 0.03, 0.24, 0.0)
    shot.during.put(cloth, pressed, rotation("z", mirror * 25))
    pose = ((-0.35, 0.80, -0.25), (0, -0.25, -0.97))
    shot.during.grip(side, pressed + [0, 0, 0.012], pose, "flat", 0.004, 0.2)
    shot.active += ["cloth", "spill"]
    shot.say(
        f"I press the {cloth.colour} cloth flat on the counter with the {side} hand and wipe the spill away.",
        hand=side,
        place=side_of(x),
        grasp="flat hand",
        motion="wipe sideways",
    )


def squeeze(shot: Shot) -> None:
    shot.station = "sink"
    sponge = shot.make("sponge")
    shot.before.put(sponge, shot.at(shot.uniform(0.28, 0.33), shot.uniform(0.16, 0.24)))
    held = shot.at(shot.uniform(-0.06, 0.06), 0.25, 0.05)
    shot.during.put(sponge, held, rotation("z", 70))
    pose = ((-0.50, 0.74, -0.40), (-0.75, -0.40, -0.45))
    shot.during.grip("right", held + [0.0, 0, 0.017], pose, "wrap", 0.022, 0.3)
    for number in range(4):
        trickle = [held + [-0.02 + 0.012 * number, 0.01, 0.0], held + [-0.022 + 0.012 * number, 0.01, -0.17]]
        shot.during.parts.append(tube(trickle, 0.003, things.WATER, 6, name="water"))
    shot.active += ["sponge"]
    shot.say(
        "With the right hand I squeeze the sponge over the sink and water drips out.",
        hand="right",
        place="middle",
        grasp="clenched around it",
        motion="squeeze",
    )


def sprinkle(shot: Shot) -> None:
    x, y = shot.front_plate()
    vessel = shot.make("pan" if shot.rng.random() < 0.5 else "pot")
    shaker = shot.make("salt")
    position = shot.at(x, y, 0.012)
    shot.put(vessel, position, rotation("z", -15) if vessel.name == "pan" else None)
    shot.before.put(shaker, shot.at(0.36, 0.22))
    turn = rotation("y", -shot.uniform(125, 140))
    top = position + [0.0, 0, 0.21]
    base = top - turn @ np.array([0, 0, shaker.height])
    shot.during.put(shaker, base, turn)
    grip = base + turn @ np.array([0, 0, 0.035])
    shot.during.grip("right", grip, SIDE, "wrap", 0.02, 0.3, turn=rotation("y", -70))
    white = Material((0.95, 0.95, 0.95), glow=0.3)
    for number in range(9):
        grain = top + [shot.uniform(-0.02, 0.02), shot.uniform(-0.02, 0.02), -0.015 - 0.013 * number]
        shot.during.parts += move([ellipsoid(0.004, 0.004, 0.004, white, 6, 4)], None, grain, "salt grains")
    shot.active += ["salt", vessel.name]
    shot.say(
        f"With the right hand I turn the salt shaker over and sprinkle salt into the {vessel.name}.",
        hand="right",
        place=side_of(x),
        grasp="around its side",
        motion="shake",
    )


def peel(shot: Shot) -> None:
    board = shot.make("board")
    middle = shot.uniform(-0.08, 0.08)
    shot.put(board, shot.at(middle, 0.26))
    shot.rng.integers(1 << 30)  # drawn and not used: the settled frames depend on the order of draws
    carrot, peeler = shot.make("carrot"), shot.make("peeler")
    shot.before.put(carrot, shot.at(middle - 0.02, 0.27, 0.018))
    shot.before.put(peeler, shot.at(middle + 0.25, 0.22, 0.012), rotation("z", 90))
    held, turn = shot.at(middle, 0.22, 0.10), rotation("z", 20)
    shot.during.put(carrot, held, turn)
    end = held + turn @ np.array([-0.085, 0, 0.017])
    shot.during.grip("left", end, ((-0.35, 0.80, -0.35), (-0.80, -0.40, -0.30)), "wrap", 0.018, 0.3)
    blade = held + turn @ np.array([0.055, -0.0, 0.032])
    shot.during.put(peeler, blade + [0.045, -0.055, 0.02], align((1, 0, 0), (-0.6, 0.75, -0.28)))
    shot.during.grip("right", blade + [0.05, -0.06, 0.02], TOOL, "wrap", 0.010, 0.3)
    for number in range(3):
        start = shot.at(middle + 0.02 + 0.03 * number, 0.22 + 0.02 * number, 0.021)
        stop = shot.at(middle + 0.07 + 0.02 * number, 0.25 + 0.01 * number, 0.024)
        shaving = tube([start, stop], 0.006, Material((0.95, 0.52, 0.14)), 6, squash=0.3, name="peel")
        shot.during.parts.append(shaving)
    shot.active += ["carrot", "peeler"]
    shot.say(
        "I hold the carrot in the left hand above the board and draw the peeler along it with the right hand.",
        hand="both",
        place=side_of(middle),
        grasp="peeler handle",
        motion="draw along",
    )


def spread(shot: Shot) -> None:
    x = shot.uniform(-0.10, 0.08)
    toast, butter, knife = shot.make("toast"), shot.make("butter"), shot.make("knife")
    position = shot.at(x, 0.22)
    shot.put(toast, position)
    shot.put(butter, shot.at(x - 0.20, 0.32))
    shot.before.put(knife, shot.at(x + 0.20, 0.19, 0.014), rotation("z", 85))
    yellow = Material((0.96, 0.84, 0.36), gloss=0.2)
    layer = box((-0.046, -0.035, 0.0166), (0.012, 0.035, 0.021), yellow, "butter layer")
    shot.during.parts.append(layer.moved(None, position))
    held = position + [0.130, -0.060, 0.062]
    shot.during.put(knife, held, rotation("z", 155) @ rotation("y", 14) @ rotation("x", 75))
    shot.during.grip("right", held + [0.01, -0.005, 0], HANDLE, "fist", 0.010, 0.3)
    shot.during.grip("left", position + [-0.055, -0.01, 0.012], RIM, "pinch", 0.006, 0.35, reach=0.10)
    shot.active += ["toast", "knife"]
    shot.say(
        "I hold the toast with the left hand and spread butter on it with the knife in my right hand.",
        hand="both",
        place=side_of(x),
        grasp="knife handle",
        motion="spread",
    )


def crack(shot: Shot) -> None:
    x = shot.uniform(-0.10, 0.08)
    bowl, egg = shot.make("bowl"), shot.make("egg")
    position = shot.at(x, shot.uniform(0.27, 0.31))
    shot.put(bowl, position)
    shot.before.put(egg, shot.at(x + 0.17, 0.20))
    above = position + [0.0, -0.055, 0.120]
    shell = Material((0.88, 0.72, 0.56))
    pose = ((-0.86, 0.38, -0.22), (-0.40, -0.85, -0.35))
    for side, mirror in (("left", -1), ("right", 1)):
        half = lathe([(0, 0), (0.013, 0.004), (0.021, 0.016), (0.022, 0.026)], shell, 14)
        shot.during.parts += move([half], rotation("y", mirror * 65), above + [mirror * 0.026, 0, 0], "egg")
        fingertips = above + [mirror * 0.036, -0.004, 0.008]
        shot.during.grip(side, fingertips, pose, "pinch", 0.014, 0.12, reach=0.105)
    yolk = ellipsoid(0.016, 0.016, 0.016, Material((0.98, 0.70, 0.08), gloss=0.4), 12, 8)
    shot.during.parts += move([yolk], None, above + [0, 0, -0.045], "egg")
    white = [above, above + [0, 0, -0.04], position + [0, -0.02, 0.02]]
    material = Material((0.93, 0.90, 0.78), gloss=0.4)
    shot.during.parts.append(tube(white, [0.008, 0.010, 0.014], material, 8, name="egg"))
    shot.active += ["egg", "bowl"]
    shot.say(
        f"With both hands I break the egg open above the {bowl.colour} bowl and let it fall in.",
        hand="both",
        place=side_of(x),
        grasp="fingertips",
        motion="pull apart",
    )


ACTIONS = {
    "take cup": Action("take", "cup", take, {"name": "cup"}),
    "take bowl": Action("take", "bowl", take, {"name": "bowl"}),
    "take bottle": Action("take", "bottle", take, {"name": "bottle"}),
    "take pan": Action("take", "pan", take, {"name": "pan"}),
    "take knife": Action("take", "knife", take, {"name": "knife"}),
    "take spoon": Action("take", "spoon", take, {"name": "spoon"}),
    "take plate": Action("take", "plate", take, {"name": "plate"}),
    "take apple": Action("take", "apple", take, {"name": "apple"}),
    "put cup": Action("put", "cup", put, {"name": "cup"}),
    "put bowl": Action("put", "bowl", put, {"name": "bowl"}),
    "put pan": Action("put", "pan", put, {"name": "pan"}),
    "put bottle": Action("put", "bottle", put, {"name": "bottle"}),
    "put apple": Action("put", "apple", put, {"name": "apple"}),
    "open drawer": Action("open", "drawer", drawer, {"opening": True}),
    "open cupboard": Action("open", "cupboard", cupboard, {"opening": True}),
    "open fridge": Action("open", "fridge", fridge, {"opening": True}),
    "open jar": Action("open", "jar", jar_lid, {"opening": True}),
    "open pot": Action("open", "pot", pot_lid, {"opening": True}),
    "close drawer": Action("close", "drawer", drawer, {"opening": False}),
    "close cupboard": Action("close", "cupboard", cupboard, {"opening": False}),
    "close fridge": Action("close", "fridge", fridge, {"opening": False}),
    "close jar": Action("close", "jar", jar_lid, {"opening": False}),
    "close pot": Action("close", "pot", pot_lid, {"opening": False}),
    "turn on tap": Action("turn on", "tap", tap, {"on": True}),
    "turn on hob": Action("turn on", "hob", hob, {"on": True}),
    "turn off tap": Action("turn off", "tap", tap, {"on": False}),
    "turn off hob": Action("turn off", "hob", hob, {"on": False}),
    "cut carrot": Action("cut", "carrot", cut, {"name": "carrot"}),
    "cut apple": Action("cut", "apple", cut, {"name": "apple"}),
    "cut bread": Action("cut", "bread", cut, {"name": "bread"}),
    "cut cucumber": Action("cut", "cucumber", cut, {"name": "cucumber"}),
    "pour water": Action("pour", "water", pour, {"source": "bottle", "vessel": "cup"}),
    "pour milk": Action("pour", "milk", pour, {"source": "milk", "vessel": "bowl"}),
    "stir pot": Action("stir", "pot", stir, {"name": "pot"}),
    "stir bowl": Action("stir", "bowl", stir, {"name": "bowl"}),
    "wash cup": Action("wash", "cup", wash, {"name": "cup"}),
    "wash bowl": Action("wash", "bowl", wash, {"name": "bowl"}),
    "wash carrot": Action("wash", "carrot", wash, {"name": "carrot"}),
    "wash hands": Action("wash", "hands", wash_hands),
    "wipe counter": Action("wipe", "counter", wipe),
    "squeeze sponge": Action("squeeze", "sponge", squeeze),
    "sprinkle salt": Action("sprinkle", "salt", sprinkle),
    "peel carrot": Action("peel", "carrot", peel),
    "spread butter": Action("spread", "butter", spread),
    "crack egg": Action("crack", "egg", crack),
}

# The settled tables of the data set. A pair's label is drawn by position, so the order is part of the data.
TRAIN_ACTIONS = (
    "take cup",
    "take bowl",
    "take pan",
    "take plate",
    "put cup",
    "put bottle",
    "put pan",
    "open drawer",
    "close drawer",
    "open cupboard",
    "close cupboard",
    "open fridge",
    "close fridge",
    "open pot",
    "turn on tap",
    "turn off tap",
    "turn on hob",
    "turn off hob",
    "pour water",
    "stir pot",
    "wash bowl",
    "wash hands",
    "wipe counter",
    "cut carrot",
)
# Combinations that training never shows; verb and noun of each occur in other training actions.
HELD_OUT_ACTIONS = ("take bottle", "put bowl", "close pot", "stir bowl", "wash cup", "wash carrot")
