"""The same scene with another action: the before frame of one pair, the hands and things of a second action.

    python -m examples.kitchen.other_action --pairs 1200 --out runs/judge_data

writes shards of a manifest for the judge's training, in kitchens of the training split: half of the rows are plain
pairs of the combinations that `render --split train` leaves out, half show another action in a scene. The same command
again goes on where it was stopped. The judge must not guess the action from the frame before it, and the table has a
row "truth of another action"; both need these pairs.

Not every scene allows another action: where hands carry something already, or where only one action is seen from
there (drawers, cupboards and the fridge), there is none.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from examples.kitchen.actions import HELD_OUT_ACTIONS, TRAIN_ACTIONS
from examples.kitchen.geom import Part
from examples.kitchen.render import SHARD, row
from examples.kitchen.scene import SPLITS, Scene, build, kitchen, shoot
from lego_pipeline.config import run
from lego_pipeline.data.manifest import write_shard

DRAWS = 12  # of the second action, before a scene is given up
TOUCH = 0.005  # metres that bounding boxes may reach into one another
STATE = {"tap": False, "hob": None}  # of the room where a stage doesn't say it
JUDGE_SEED = 4  # SPLITS has 1 to 3


@dataclass(kw_only=True)
class OtherActionConfig:
    out: Path  # folder of the shards
    pairs: int = 1200
    size: int = 128  # pixels along a side of the frames

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"`pairs` must be at least 1, got {self.pairs}.")


def other_action(scene: Scene, seed: int, index: int) -> Scene | None:
    """The same before frame, and another action in the frame after it; None where the scene allows none.

    Args:
        scene: from `build`.
        seed, index: all that is random follows from these two.
    """
    shot = scene.shot
    if shot.before.hands:
        return None
    rng = np.random.default_rng([seed, index, zlib.crc32(b"other action")])
    names = [name for name in (*TRAIN_ACTIONS, *HELD_OUT_ACTIONS) if name != scene.action]
    for draw in range(DRAWS):
        name = names[int(rng.integers(len(names)))]
        other = build(seed, index * DRAWS + draw, kitchens=1, first_kitchen=scene.kitchen, actions=(name,))
        stage = other.shot
        if (stage.view, stage.station) != (shot.view, shot.station) or stage.before.hands:
            continue
        if any(value != shot.before.state.get(key, STATE.get(key)) for key, value in stage.before.state.items()):
            continue
        added = _added(other)
        if _collide(shot.before.parts, [part for part in added if not part.name.startswith("hand_")]):
            continue
        state = {**shot.before.state, **stage.during.state}
        room = kitchen(scene.kitchen).build(near=shot.station, **state)
        after = room + shot.before.parts + added
        return replace(
            other, parts=(scene.parts[0], after), cameras=scene.cameras, hands=(scene.hands[0], other.hands[1])
        )
    return None


def _added(scene: Scene) -> list[Part]:
    """What a scene's second frame has beside the room and bystanders: things of the action and the cook's hands."""
    room = kitchen(scene.kitchen).build(near=scene.shot.station, **scene.shot.during.state)
    return [part for part in scene.parts[1][len(room) :] if not part.name.startswith("other")]


def _collide(first: list[Part], second: list[Part]) -> bool:
    """Whether bounding boxes of two lists of parts reach into one another."""

    def edges(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
        low, high = ([reach(part.vertices, 0) for part in parts] for reach in (np.min, np.max))
        return np.array(low).reshape(-1, 3), np.array(high).reshape(-1, 3)

    (low_1, high_1), (low_2, high_2) = edges(first), edges(second)
    shared = np.minimum(high_1[:, None], high_2[None]) - np.maximum(low_1[:, None], low_2[None])
    return bool((shared > TOUCH).all(-1).any())


def other_row(split: str, index: int, size: int = 128) -> dict | None:
    """Manifest row of pair `index` of a settled split with another action in its scene, or None."""
    settled = SPLITS[split]
    scene = build(
        settled.seed,
        index,
        kitchens=settled.kitchens,
        first_kitchen=settled.first_kitchen,
        actions=settled.actions,
    )
    other = other_action(scene, settled.seed, index)
    return None if other is None else row({**shoot(other, size), "index": index}, split)


def judge_rows(indices: range, size: int) -> list[dict]:
    """Rows of the judge's own training data; those of even numbers are plain pairs."""
    settled, rows = SPLITS["train"], []
    set_up = partial(build, JUDGE_SEED, kitchens=settled.kitchens, first_kitchen=settled.first_kitchen)
    for index in indices:
        scene = None
        if index % 2:
            scene = other_action(set_up(index, actions=(*TRAIN_ACTIONS, *HELD_OUT_ACTIONS)), JUDGE_SEED, index)
        scene = scene or set_up(index, actions=HELD_OUT_ACTIONS)
        made = row({**shoot(scene, size), "index": index}, "train")
        rows.append({**made, "id": f"kitchen-judge-{index:07d}"})
    return rows


def main(config: OtherActionConfig) -> None:
    shards = [range(first, min(first + SHARD, config.pairs)) for first in range(0, config.pairs, SHARD)]
    for shard in tqdm(shards, desc="judge's pairs", unit="shard"):
        path = config.out / f"train-{shard.start:06d}-{shard.stop:06d}.parquet"
        if not path.exists():
            write_shard(judge_rows(shard, config.size), path)


if __name__ == "__main__":
    run(main, OtherActionConfig, __doc__)
