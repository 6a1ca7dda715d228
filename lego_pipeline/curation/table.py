"""A plain CSV of own videos as actions: `video,start,stop,action` and, if you have them, more columns.

| column | content |
|---|---|
| video | name of the file, with or without suffix and folders |
| start, stop | seconds (75.3) or a clock time (00:01:15.3) |
| action | the label, "open drawer" |
| id | unique name; otherwise made of video, start and line number |
| verb, noun, split, source, licence | as in the manifest |
| boxes | JSON: `[{"time": 1.5, "boxes": [{"name": "hand_right", "x0": 0.4, "y0": 0.5, "x1": 0.6, "y1": 0.9}]}]`, edges in fractions of the frame, one entry for each time at which hands and objects were marked |

Other columns go to the manifest's `slots`.
"""  # noqa: E501

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lego_pipeline.curation.actions import (
    SPLITS,
    Action,
    Moment,
    Timing,
    clipped_box,
    read_rows,
    seconds,
    segment_times,
    split_of,
)
from lego_pipeline.curation.video import SUFFIXES

REQUIRED = ("video", "start", "stop", "action")
KNOWN = (*REQUIRED, "id", "verb", "noun", "split", "source", "licence", "boxes")


def read_table(path: Path, timing: Timing, licence: str = "", source: str = "") -> list[Action]:
    """Actions of one CSV file.

    Args:
        path: of the file.
        timing: where the frames are looked for.
        licence, source: of rows that don't say; the source is the file's name otherwise.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`; or a row without a licence, with an unknown split, or with
            boxes of another form.
    """
    actions = []
    for line, row in read_rows(path, REQUIRED):
        place = f"{path}, line {line}"
        own_licence = row.get("licence") or licence
        if not own_licence:
            raise ValueError(f"{place} must have a licence; add a column `licence` or give `--licence` for all rows.")
        file = Path(row["video"])
        video = file.stem if file.suffix.lower() in SUFFIXES else file.name
        split = row.get("split") or split_of(video, timing)
        if split not in SPLITS:
            raise ValueError(f"{place}: `split` must be {', '.join(SPLITS)} or empty, got {split!r}.")
        times: dict[str, Any] = segment_times(seconds(row["start"]), seconds(row["stop"]), timing)
        if not row["action"]:
            times = {"reason": "no label", "detail": "the row has no action"}
        actions.append(
            Action(
                id=row.get("id") or f"{video}-{row['start']}-{line:06d}",
                video=video,
                action=row["action"],
                verb=row.get("verb", ""),
                noun=row.get("noun", ""),
                split=split,
                source=row.get("source") or source or path.stem,
                licence=own_licence,
                moments=_moments(row.get("boxes", ""), place),
                facts={name: value for name, value in row.items() if name not in KNOWN and value},
                **times,
            )
        )
    return actions


def _moments(text: str, place: str) -> tuple[Moment, ...]:
    """The `boxes` column."""
    if not text:
        return ()
    try:
        moments = [
            (float(moment["time"]), tuple(filter(None, (_box(box) for box in moment["boxes"]))))
            for moment in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{place}: `boxes` must be JSON like [{{"time": 1.5, "boxes": [{{"name": "hand_right", "x0": 0.4, '
            f'"y0": 0.5, "x1": 0.6, "y1": 0.9}}]}}], got {text[:60]!r} ({type(error).__name__}: {error}).'
        ) from error
    return tuple(sorted(moments, key=lambda moment: moment[0]))


def _box(box: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(box["name"], str) or not box["name"]:
        raise ValueError("a box has no name")
    return clipped_box(box["name"], *(float(box[edge]) for edge in ("x0", "y0", "x1", "y1")))
