"""Verb swap and noun swap: the same frame with another action, "close drawer" or "open cupboard" for "open drawer".

A score that sees what was done prefers the picture of the asked action to the same system's picture of a swapped one.
EgoNCE++ (Xu et al., 2024) shows that video-text models often miss one swapped word, so this is asked of the scores as
well as of the systems: `lego swap` writes the manifest of swapped actions, `lego generate --data` draws it, and
`lego evaluate --swapped` compares. A swapped action is taken from the data's own, so that it is one that people do;
that it can be done in this very scene is not known.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from lego_pipeline.data.manifest import write_shard

Part = Literal["verb", "noun"]
PARTS: tuple[Part, ...] = ("verb", "noun")
SHARD = 500  # rows of a file
NAMES = "swapped-*.parquet"
KEPT = ("image_0", "video", "time_0", "split", "source", "licence")  # columns that a swapped row takes over


@dataclass(frozen=True)
class Action:
    """A label and its two parts."""

    action: str
    verb: str
    noun: str


def parts_of(action: str, verb: str | None, noun: str | None) -> Action:
    """The label of a row with its parts; without them the first word is the verb and the rest the noun."""
    first, _, rest = action.strip().partition(" ")
    return Action(action, verb or first, noun or rest)


def swapped_id(row_id: str, part: Part) -> str:
    """Id of a row's swapped copy, and so the name of its picture."""
    return f"{row_id}--{part}"


def swap_actions(ids: Sequence[str], actions: Sequence[Action], part: Part) -> list[Action | None]:
    """For each row another action of the data that differs in one part.

    Args:
        ids: N names of the rows, which decide between several actions.
        actions: theirs, which are also the vocabulary.
        part: verb: another verb for the same noun; noun: another noun for the same verb.

    Returns:
        N actions; None where the data have none.
    """
    vocabulary = sorted(set(actions), key=lambda action: action.action)
    kept: Callable[[Action], str] = (lambda a: a.noun) if part == "verb" else (lambda a: a.verb)
    swapped: Callable[[Action], str] = (lambda a: a.verb) if part == "verb" else (lambda a: a.noun)
    by_kept: dict[str, list[Action]] = {}
    for action in vocabulary:
        by_kept.setdefault(kept(action), []).append(action)
    result: list[Action | None] = []
    for row_id, action in zip(ids, actions, strict=True):
        others = [other for other in by_kept[kept(action)] if swapped(other) != swapped(action)]
        digest = hashlib.sha256(f"{part} {row_id}".encode()).digest()
        result.append(others[int.from_bytes(digest[:8], "big") % len(others)] if others else None)
    return result


def write_swapped(rows: Dataset, folder: Path) -> dict[str, int]:
    """Writes a manifest with a verb-swapped and a noun-swapped copy of every row that has one.

    The copies have the columns id, image_0, action, verb, noun and `KEPT`, and `swap_of` and `swap_part` for the row
    that they come from. They have no description, which would tell the old action, and no target, which nobody saw.

    Args:
        rows: of a manifest, images undecoded.
        folder: of the shards; the same call writes the same files.

    Returns:
        How many copies there are of each part.

    Raises:
        ValueError: no action of the data has another with the same verb or noun.
    """
    names = [name for name in ("id", "action", "verb", "noun", *KEPT) if name in rows.features]
    facts = rows.select_columns(["id", "action", "verb", "noun"])[:]
    actions = [parts_of(*parts) for parts in zip(facts["action"], facts["verb"], facts["noun"], strict=True)]
    swaps = {part: swap_actions(facts["id"], actions, part) for part in PARTS}
    wanted = [
        (number, part, other)
        for number in range(len(rows))
        for part in PARTS
        if (other := swaps[part][number]) is not None
    ]
    if not wanted:
        raise ValueError(
            f"`--data` must have actions that share a verb or a noun, got {len(set(actions))} that share neither; "
            "take more rows."
        )
    light = rows.select_columns(names)
    written = set()
    for first in range(0, len(wanted), SHARD):
        shard = [_swapped_row(light[number], part, other) for number, part, other in wanted[first : first + SHARD]]
        written.add(folder / f"swapped-{first:06d}.parquet")
        write_shard(shard, folder / f"swapped-{first:06d}.parquet")
    for stale in set(folder.glob(NAMES)) - written:  # of an earlier call with more rows
        stale.unlink()
    return {part: sum(other is not None for other in swaps[part]) for part in PARTS}


def _swapped_row(row: dict[str, Any], part: Part, other: Action) -> dict[str, Any]:
    """A manifest row with the other action; the frame's file goes over as it is."""
    frame = row["image_0"]
    content = Path(frame["path"]).read_bytes() if frame["bytes"] is None else frame["bytes"]
    return {
        **{name: row[name] for name in KEPT if name in row},
        "image_0": content,
        "id": swapped_id(row["id"], part),
        "action": other.action,
        "verb": other.verb,
        "noun": other.noun,
        "swap_of": row["id"],
        "swap_part": part,
    }
