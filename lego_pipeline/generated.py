"""Folders of generated pictures: which picture belongs to which row of the manifest, and was it made for it.

A folder is what `lego generate --data` wrote, `<id>.png` beside `generation.jsonl`, by whatever system; or the
released tree, `<run>/images/<clip>/<action>/<frame>`, found by the manifest's `frame_path`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lego_pipeline.cli import records

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # the first that is there is taken
RELEASED = 3  # last parts of a frame's path that the release goes by: clip, action, frame
SHOWN = 5  # names in a message; the rest are counted


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The pictures of one system.

    Attributes:
        name: of the system.
        folder: where they are.
        paths: for each row its picture, None where there is none.
        records: what `generation.jsonl` says, by id.
    """

    name: str
    folder: Path
    paths: list[Path | None]
    records: dict[str, dict[str, Any]]


def parse_name(text: str, flag: str) -> tuple[str, Path]:
    """Reads `NAME=DIR` or `DIR`, whose name is then that of the folder.

    Raises:
        NotADirectoryError: it is no folder.
    """
    name, sign, rest = text.partition("=")
    # The released folders have "=" in their names.
    folder = Path(rest) if sign and not Path(text).is_dir() else Path(text)
    if not folder.is_dir():
        raise NotADirectoryError(f"`{flag}` must name a folder of generated pictures, got {text}; check the path.")
    return (folder.resolve().name if folder == Path(text) else name.strip()) or folder.resolve().name, folder


def read_generated(name: str, folder: Path, rows: Sequence[Mapping[str, Any]], flag: str) -> Generated:
    """Finds the picture of every row.

    Args:
        name: of the system.
        folder: of its pictures.
        rows: {id, action, frame_path or None, image_sha256} of the manifest, the last of the input frame's file.
        flag: that messages name.

    Raises:
        ValueError: several released runs in one folder, or pictures that were made from another frame or action.
    """
    known = records.read_records(folder / records.RECORDS)
    paths = [_named_by_id(folder, row["id"]) for row in rows]
    if not any(paths) and any(row["frame_path"] for row in rows):
        tree = _released_tree(folder, rows, flag)
        if tree is not None:
            paths = [_named_by_frame(tree, row["frame_path"]) for row in rows]
            for place in (tree, tree.parent):
                known |= records.read_records(place / records.RECORDS)
    _check_records(name, rows, known, flag)
    return Generated(name=name, folder=folder, paths=paths, records=known)


def _named_by_id(folder: Path, row_id: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{row_id}{suffix}").is_file()), None)


def _named_by_frame(tree: Path, frame_path: str | None) -> Path | None:
    path = tree.joinpath(*PurePosixPath(frame_path or "").parts[-RELEASED:])
    return path if path.is_file() else None


def _released_tree(folder: Path, rows: Sequence[Mapping[str, Any]], flag: str) -> Path | None:
    """The folder of the clips: this one, its `images`, or that of the one run in it."""
    runs = sorted(place for place in folder.glob("*/images") if place.is_dir())
    places = [folder, folder / "images", *runs]
    found = [place for place in places if any(_named_by_frame(place, row["frame_path"]) for row in rows)]
    if len(found) > 1:
        names = ", ".join(str(place) for place in found[:SHOWN])
        raise ValueError(f"`{flag}` must name one run of pictures, got {folder}, which holds {names}; name one.")
    return found[0] if found else None


def _check_records(
    name: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], flag: str
) -> None:
    """Refuse pictures that were made for something else."""
    wrong = []
    for row in rows:
        record = known.get(row["id"], {})
        digest = (record.get("request") or {}).get("image_sha256")
        if record.get("action") not in (None, row["action"]) or digest not in (None, row["image_sha256"]):
            wrong.append(row["id"])
    if wrong:
        raise ValueError(
            f"`{flag}` must hold pictures of the manifest's own frames and actions, but by its "
            f"{records.RECORDS} {name} made {named(wrong)} from others; generate them again."
        )


def named(ids: Sequence[str]) -> str:
    """How many there are, and the first ids."""
    rest = len(ids) - SHOWN
    return f"{len(ids)} row{'s' if len(ids) > 1 else ''} ({', '.join(ids[:SHOWN])}{f', and {rest} more' * (rest > 0)})"
