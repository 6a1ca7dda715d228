"""An annotated action of a video, as the readers of annotation files give it and curation takes it.

All times are seconds on the clock of the annotations, which starts at the video's first frame
(`lego_pipeline.curation.video`).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lego_pipeline.data.shards import content_key

Box = Mapping[str, Any]  # a box of the manifest: name, x0, y0, x1, y1 in fractions of the frame
Moment = tuple[float, tuple[Box, ...]]  # a time at which all hands and active objects were marked

SPLITS = ("train", "val", "test")
LONGEST_FIELD = 2**24  # characters of a CSV's field, for boxes at many moments; the module's own limit is 2**17


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where in an annotated action its two frames are looked for.

    Attributes:
        before_seconds: the input frame lies this long before the start of a (start, stop) action: d_i of the paper,
            whose value is not published.
        target_position: the target frame lies at this share of (start, stop); 0.5 is the middle.
        after_seconds: instead of it, the target frame lies this long after the start (d_o of the paper), at most at
            the stop.
        ego4d_input, ego4d_target: critical frames of Ego4D FHO. Without a point of no return (no change of state) the
            contact frame is the target.
        val_share: share of the videos that go to val where the annotations have no split, chosen by a digest of the
            video's name, so that no video is in both.
    """

    before_seconds: float = 0.25
    target_position: float = 0.5
    after_seconds: float | None = None
    ego4d_input: str = "pre_15"
    ego4d_target: str = "pnr_frame"
    val_share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Action:
    """One annotated action.

    Attributes:
        id: unique; that of the pair in the manifest.
        video: name of the file without folder and suffix.
        action, verb, noun: the label and its two parts.
        time_0, time_1: where the input frame and the target frame are looked for; None only with a reason.
        split, source, licence: as in the manifest.
        reason, detail: why the annotation alone rules the action out, a key of
            `lego_pipeline.curation.frames.REASONS`; None if it doesn't.
        moments: annotated boxes. An entry without boxes says that there were none; times far from any entry are
            unknown.
        facts: for the manifest's `slots`.
    """

    id: str
    video: str
    action: str
    source: str
    licence: str
    split: str = "train"
    time_0: float | None = None
    time_1: float | None = None
    verb: str = ""
    noun: str = ""
    reason: str | None = None
    detail: str = ""
    moments: tuple[Moment, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def segment_times(start: float | None, stop: float | None, timing: Timing) -> dict[str, Any]:
    """`time_0` and `time_1` of an action with start and stop, or the `reason` and `detail` that rule it out."""
    if start is None or stop is None:
        return {"reason": "bad times", "detail": "start or stop is no time"}
    if not 0 <= start < stop:
        return {
            "reason": "bad times",
            "detail": f"it must start at 0 or later and stop after, got {start} to {stop} s",
        }
    if start < timing.before_seconds:
        detail = f"the action starts at {start:.3f} s, the input frame should lie {timing.before_seconds} s before"
        return {"reason": "starts too early", "detail": detail}
    after = (stop - start) * timing.target_position
    if timing.after_seconds is not None:
        after = min(timing.after_seconds, stop - start)
    return {"time_0": start - timing.before_seconds, "time_1": start + after}


def seconds(text: str | None) -> float | None:
    """Seconds of "75.3" or "00:01:15.30"; None if it is neither."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)", (text or "").strip())
    if match is None:
        return None
    hours, minutes, rest = match.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(rest)


def split_of(video: str, timing: Timing) -> str:
    """train or val for a video whose annotations don't say."""
    draw = int(content_key("split", video)[:8], 16) / 16**8
    return "val" if draw < timing.val_share else "train"


def read_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their line numbers; missing values are empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or a column is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`annotations` must be files, found none at {path}; check the path.")
    try:
        csv.field_size_limit(LONGEST_FIELD)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            missing = [name for name in required if name not in columns]
            if missing:
                raise ValueError(
                    f"{path} must have the columns {', '.join(required)}, lacks {', '.join(missing)}; it has "
                    f"{', '.join(columns) or 'no header'}."
                )
            for row in reader:
                yield reader.line_num, {name: value.strip() for name, value in row.items() if isinstance(name, str)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, got: {error}.") from error


def clipped_box(name: str, x0: float, y0: float, x1: float, y1: float) -> dict[str, Any] | None:
    """A box cut to the frame, in fractions; None if nothing of it is inside or an edge is no number."""
    if not all(math.isfinite(edge) for edge in (x0, y0, x1, y1)):
        return None
    x0, y0, x1, y1 = (round(min(max(float(edge), 0.0), 1.0), 4) for edge in (x0, y0, x1, y1))
    return {"name": name, "x0": x0, "y0": y0, "x1": x1, "y1": y1} if x0 < x1 and y0 < y1 else None
