"""The systems of a study: their names and folders, and the descriptions in them by row id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lego_pipeline.cli.records import RECORDS, read_records

MOST = 9  # systems in one study: as many as there are keys


def parse_systems(texts: Sequence[str]) -> dict[str, Path]:
    """Names and folders of `NAME=DIR`.

    Raises:
        ValueError: a text of another form, a name twice, or more than nine.
        FileNotFoundError: a folder that isn't there.
    """
    systems: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (equals and name.strip() and folder):
            raise ValueError(f"`--systems` must be NAME=DIR, got {text!r}; write for instance lego=outputs/lego.")
        name = name.strip()
        if name in systems:
            raise ValueError(f"`--systems` must have different names, got {name} twice; rename one.")
        systems[name] = Path(folder)
        if not systems[name].exists():
            raise FileNotFoundError(
                f"`--systems` must name what `lego generate --data` wrote, but there is nothing at {folder}."
            )
    if len(systems) > MOST:
        raise ValueError(f"`--systems` must be at most {MOST}, one for each number key, got {len(systems)}.")
    return systems


def find_descriptions(source: Path) -> dict[str, str]:
    """Descriptions by row id, those that there are.

    Args:
        source: a folder with the records of `lego generate`, or a .jsonl file of {id, description}.

    Raises:
        ValueError: there are none.
    """
    found = {
        str(record["id"]): record["description"].strip()
        for record in records_in(source)
        if isinstance(record.get("description"), str) and record["description"].strip()
    }
    if not found:
        raise ValueError(
            f"`--systems` must name a folder with a {RECORDS}, or a .jsonl file of id and description, got {source} "
            "without a description."
        )
    return found


def records_in(source: Path) -> Iterator[Mapping[str, Any]]:
    """Records in a .jsonl file, or of what was generated into a folder and the folders in it."""
    files = [source] if source.is_file() else sorted([*source.glob(RECORDS), *source.glob(f"*/{RECORDS}")])
    for file in files:
        yield from read_records(file).values()
