"""Curation shared over processes, killed at any moment and taken up again, with one result.

Actions are cut into units of one video each. A process does every n-th unit and writes what came of it to
`work/NNNNNN.parquet` (rows of kept pairs) and `work/NNNNNN.json` (the fate of every action, example pictures), the
latter last: what has it is done. When all are done, one process joins them in the order of the units, which depends on
the annotations alone. So the manifest has the same bytes for any number of processes, and after any kill.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from lego_pipeline.atomic import write_atomically, write_text
from lego_pipeline.curation.actions import Action
from lego_pipeline.curation.frames import REASONS, Outcome
from lego_pipeline.curation.report import write_report
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.data.shards import content_key

logger = logging.getLogger(__name__)

UNIT = 50  # actions, and what a kill costs at most
SHARD = 500  # pairs of a file of the manifest
EXAMPLES = 6  # of a reason in the report
SUMMARY = "summary.json"
KEPT = "kept"


def cut_units(actions: Sequence[Action]) -> list[list[Action]]:
    """Actions in the order of `read_actions` as units of at most `UNIT`, each of one video."""
    units = []
    for _, group in groupby(actions, key=lambda action: action.video):
        own = list(group)
        units += [own[start : start + UNIT] for start in range(0, len(own), UNIT)]
    return units


def own_units(units: Sequence[Sequence[Action]], rank: int, processes: int) -> list[int]:
    """Numbers of the units of one process. Those of a video belong to one, which does them in order: what repeats an
    earlier pair of the video is dropped."""
    videos = {video: i for i, video in enumerate(dict.fromkeys(unit[0].video for unit in units))}
    return [number for number, unit in enumerate(units) if videos[unit[0].video] % processes == rank]


class Work:
    """The folder of a curation.

    Args:
        folder: `output_dir`.
        settings: all that the result depends on, as JSON holds it.

    Attributes:
        summary: of a curation that is finished, else None.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.work, self.settings = folder, folder / "work", settings
        path = folder / SUMMARY
        self.summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def claim(self) -> None:
        """Notes the settings in the folder, or checks that they are the same; by one process, before the others go on.

        What a kill has left of the work behind a finished result is removed.

        Raises:
            ValueError: the folder belongs to a curation with other settings.
        """
        path = self.work / "settings.json"
        there = self.summary["settings"] if self.summary else None
        if there is None and path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
        if there is None:
            self.work.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(self.settings, indent=1))
            return
        other = sorted(key for key in {*there, *self.settings} if there.get(key) != self.settings.get(key))
        if other:
            raise ValueError(
                f"`output_dir` {self.folder} holds a curation with other {', '.join(other)}; name another folder."
            )
        if self.summary is not None:
            shutil.rmtree(self.work, ignore_errors=True)

    def is_done(self, number: int, unit: Sequence[Action], videos: dict[str, Path]) -> bool:
        """Whether a unit was done with its video file as it is now; one that was missing then is done again."""
        path = self.work / f"{number:06d}.json"
        if not path.is_file():
            return False
        done = json.loads(path.read_text(encoding="utf-8"))
        return done["key"] == _key(unit) and done["size"] == _size(unit, videos)

    def earlier(self, number: int, units: Sequence[Sequence[Action]]) -> list[dict[str, Any]]:
        """The kept pairs of a unit's video in the units before it, for `curate`."""
        names = ["video", "action", "pts_0", "pts_1", "time_base", "image_0", "image_1"]
        rows = []
        for before in range(number):
            path = self.work / f"{before:06d}.parquet"
            if units[before][0].video == units[number][0].video and path.is_file():
                rows += pq.read_table(path, columns=names).to_pylist()
        images = ({k: PIL.Image.open(io.BytesIO(row[k]["bytes"])) for k in ("image_0", "image_1")} for row in rows)
        return [row | own for row, own in zip(rows, images, strict=True)]

    def write_unit(
        self, number: int, unit: Sequence[Action], videos: dict[str, Path], outcomes: Sequence[Outcome]
    ) -> None:
        """Writes what came of a unit."""
        rows = [outcome.row for outcome in outcomes if outcome.row is not None]
        path = self.work / f"{number:06d}.parquet"
        if rows:
            write_shard(rows, path)
        else:
            path.unlink(missing_ok=True)
        examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for outcome in outcomes:
            shown = examples[outcome.reason or KEPT]
            if len(shown) < EXAMPLES:
                shown.append(_example(outcome))
        content = {
            "key": _key(unit),
            "size": _size(unit, videos),
            "outcomes": [_record(outcome) for outcome in outcomes],
            "examples": examples,
        }
        write_text(self.work / f"{number:06d}.json", json.dumps(content))

    def finish(self, count: int) -> dict[str, Any]:
        """Joins `count` units to the manifest, the list of outcomes, the report and the summary, which comes last.

        Returns:
            The summary: numbers of actions, pairs, drops by reason, pairs by split and by boxes.

        Raises:
            ValueError: a unit is not there.
        """
        there = sum((self.work / f"{number:06d}.json").is_file() for number in range(count))
        if there < count:
            raise ValueError(
                f"`output_dir` must be a folder that all processes see, {self.work} has {there} of {count} parts; "
                "name one on a shared disk."
            )
        self._join_manifest(count)
        records, examples = [], defaultdict(list)
        for number in range(count):
            content = json.loads((self.work / f"{number:06d}.json").read_text(encoding="utf-8"))
            records += content["outcomes"]
            for reason, shown in content["examples"].items():
                examples[reason] = (examples[reason] + shown)[:EXAMPLES]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_text(self.folder / "outcomes.jsonl", "\n".join(lines) + "\n")
        self.summary = summarise(records) | {"settings": self.settings}
        write_report(self.folder / "report.html", self.summary, examples)
        write_text(self.folder / SUMMARY, json.dumps(self.summary, indent=1) + "\n")
        shutil.rmtree(self.work)
        return self.summary

    def _join_manifest(self, count: int) -> None:
        """Writes the units' rows as shards of `SHARD` pairs, `manifest/SPLIT/NNNNNN.parquet`."""
        shutil.rmtree(self.folder / "manifest", ignore_errors=True)  # of a kill while joining; it may have had more
        waiting: dict[str, list[pa.Table]] = defaultdict(list)
        written: Counter[str] = Counter()

        def write(split: str, table: pa.Table) -> None:
            path = self.folder / "manifest" / split / f"{written[split]:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda unfinished: pq.write_table(table, unfinished, compression="zstd"))
            written[split] += 1

        for table in self._tables(count):
            for split in sorted(set(table["split"].to_pylist())):
                own = pa.array([value == split for value in table["split"].to_pylist()])
                waiting[split].append(table.filter(own))
                while sum(map(len, waiting[split])) >= SHARD:
                    joined = pa.concat_tables(waiting[split]).combine_chunks()
                    write(split, joined[:SHARD])
                    waiting[split] = [joined[SHARD:]]
        for split, tables in sorted(waiting.items()):
            rest = pa.concat_tables(tables).combine_chunks()
            if len(rest):
                write(split, rest)

    def _tables(self, count: int) -> Iterator[pa.Table]:
        for number in range(count):
            path = self.work / f"{number:06d}.parquet"
            if path.is_file():
                yield pq.read_table(path)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all outcomes; those of `dropped` and `pairs` add up to `actions`."""
    reasons = Counter(record["reason"] for record in records)
    kept = [record for record in records if record["reason"] is None]
    boxes = Counter("both" if all(one["boxes"]) else "one" if any(one["boxes"]) else "none" for one in kept)
    return {
        "actions": len(records),
        "videos": len({record["video"] for record in records}),
        "pairs": len(kept),
        "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "pairs_by_split": dict(sorted(Counter(record["split"] for record in kept).items())),
        "pairs_with_boxes_in_frames": {number: boxes[number] for number in ("both", "one", "none")},
    }


def _record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a line of outcomes.jsonl; `boxes`: whether any are known of the input and of the target frame."""
    action, row = outcome.action, outcome.row
    record = {
        "id": action.id,
        "video": action.video,
        "action": action.action,
        "split": action.split,
        "reason": outcome.reason,
        "detail": outcome.detail,
        "wanted": [None if time is None else round(time, 4) for time in (action.time_0, action.time_1)],
    }
    if row is not None:
        record |= {"times": [row["time_0"], row["time_1"]], "similarity": row["similarity"]}
        record |= {"boxes": [bool(row["boxes_0"]), bool(row["boxes_1"])]}
    return record


def _example(outcome: Outcome) -> dict[str, Any]:
    pictures = []
    for picture in outcome.pictures:
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80)
        pictures.append(base64.b64encode(jpeg.getvalue()).decode())
    return {
        "id": outcome.action.id,
        "action": outcome.action.action,
        "detail": outcome.detail,
        "pictures": pictures,
    }


def _key(unit: Sequence[Action]) -> str:
    return content_key([action.id for action in unit])


def _size(unit: Sequence[Action], videos: dict[str, Path]) -> int | None:
    path = videos.get(unit[0].video)
    return None if path is None or not path.is_file() else path.stat().st_size
