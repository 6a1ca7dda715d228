"""Annotation files of all formats as one list of actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lego_pipeline.curation.actions import Action, Timing
from lego_pipeline.curation.ego4d import read_ego4d
from lego_pipeline.curation.epic import read_epic
from lego_pipeline.curation.table import read_table

Format = Literal["ego4d", "epic", "table"]


def read_actions(
    paths: Sequence[Path],
    format: Format,
    timing: Timing | None = None,
    *,
    licence: str = "",
    source: str = "",
    ego4d_clips: bool = False,
) -> list[Action]:
    """Annotated actions by video and time; the order doesn't depend on that of the files.

    Args:
        paths: annotation files.
        format: "ego4d" for fho_main.json, "epic" for EPIC-KITCHENS-100's CSV, "table" for a CSV of your own.
        timing: where the frames are looked for; the default of `Timing` if None.
        licence, source: of a table's rows that don't say; for the data sets, instead of their own.
        ego4d_clips: see `read_ego4d`.

    Raises:
        FileNotFoundError, ValueError: a file is not there or not of its format, or ids occur twice.
    """
    timing = timing or Timing()
    actions: list[Action] = []
    for path in paths:
        if format == "table":
            actions += read_table(path, timing, licence, source)
            continue
        read = read_epic(path, timing) if format == "epic" else read_ego4d(path, timing, ego4d_clips)
        actions += [
            replace(action, licence=licence or action.licence, source=source or action.source) for action in read
        ]
    if not actions:
        raise ValueError(f"`annotations` must hold actions, got none in {', '.join(map(str, paths))}.")
    twice = [name for name, count in Counter(action.id for action in actions).items() if count > 1]
    if twice:
        raise ValueError(
            f"`annotations` must have a unique id for every action, got {len(twice)} that occur twice, the first is "
            f"{twice[0]!r}; name every file once."
        )
    return sorted(actions, key=lambda action: (action.video, action.time_1 or 0.0, action.id))
