"""EPIC-KITCHENS-100 annotations (CSV) as actions.

Layout: epic-kitchens/epic-kitchens-100-annotations, `EPIC_100_train.csv` and `EPIC_100_validation.csv`. Times are
those of `start_timestamp` and `stop_timestamp`: the frame columns index JPEG files that were re-sampled at 60 or 50 a
second, not frames of the videos (`start_frame` is floor(60 t) in a video of 59.94, 47.95 or 90 frames a second), and
are not read. The pickled twins of the files are not read either.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from lego_pipeline.curation.actions import Action, Timing, read_rows, seconds, segment_times, split_of

LICENCE = "CC BY-NC 4.0"
SOURCE = "EPIC-KITCHENS-100"
COLUMNS = ("narration_id", "video_id", "start_timestamp", "stop_timestamp")


def read_epic(path: Path, timing: Timing) -> list[Action]:
    """Actions of one annotation file; the split is that of its name (train, validation).

    `slots` of a pair has `overlap_before` if the input frame lies inside another action of the video, which is normal
    there (27 % of the validation actions start inside an earlier one): two hands, or one action within another.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    rows = [row for _, row in read_rows(path, COLUMNS)]
    ends = _latest_ends(rows)
    known = next((own for part, own in (("train", "train"), ("validation", "val")) if part in path.stem.lower()), None)
    actions = []
    for row in rows:
        start, stop = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
        times: dict[str, Any] = segment_times(start, stop, timing)
        label = row.get("narration", "")
        if not label:
            times = {"reason": "no label", "detail": "the row has no narration (a test file?)"}
        facts = {name: row[name] for name in ("verb_class", "noun_class", "participant_id") if row.get(name)}
        if times.get("time_0") is not None and start is not None:
            starts, latest = ends[row["video_id"]]
            earlier = bisect_right(starts, times["time_0"])
            if earlier and latest[earlier - 1] > times["time_0"]:
                facts["overlap_before"] = "yes"
        actions.append(
            Action(
                id=f"epic-{row['narration_id']}",
                video=row["video_id"],
                action=label,
                verb=row.get("verb", "").replace("-", " "),
                noun=plain_noun(row.get("noun", "")),
                split=known or split_of(row["video_id"], timing),
                source=SOURCE,
                licence=LICENCE,
                facts=facts,
                **times,
            )
        )
    return actions


def plain_noun(noun: str) -> str:
    """ "pizza slice" for "slice:pizza": the head comes first in the annotations."""
    head, *rest = noun.split(":")
    return " ".join([*rest, head])


def jpeg_rate(video: str) -> int:
    """Published JPEG frames a second of a video: 50 in the extension of 2020 (`P01_101`), 60 before (`P01_01`)."""
    return 50 if re.fullmatch(r"P\d+_1\d\d", video) else 60


def jpeg_time(video: str, number: int) -> float:
    """Seconds of a published JPEG frame (`frame_0000000001.jpg` is number 1), within one frame."""
    return (number - 1) / jpeg_rate(video)


def _latest_ends(rows: list[dict[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
    """For each video the starts of its actions in order, and beside each the latest stop so far."""
    segments = defaultdict(list)
    for row in rows:
        start, stop = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
        if start is not None and stop is not None:
            segments[row["video_id"]].append((start, stop))
    return {
        video: ([start for start, _ in sorted(own)], list(accumulate((stop for _, stop in sorted(own)), max)))
        for video, own in segments.items()
    }
