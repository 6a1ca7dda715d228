"""What came of each row, one JSON line as soon as it is known: whatever moment a kill comes at, the rest is kept."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lego_pipeline.curation.descriptions_server import Asked


def read_journal(path: Path) -> list[Asked]:
    """All outcomes in their order; a last line without its line break, which `Journal` cuts off, is left out.

    Raises:
        ValueError: a line that is none of these.
    """
    outcomes = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if not line:
            continue
        try:
            fields: dict[str, Any] = json.loads(line)
            fields["answers"] = tuple(fields["answers"])
            outcomes.append(Asked(**fields))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: must be an outcome of curate_descriptions, got {line[:60]!r}; remove it."
            ) from None
    return outcomes


class Journal:
    """Appends outcomes to a file, which one run at a time may do.

    Args:
        path: of the file; what a kill left of a last line is cut off.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        self._file = open(path, "ab")
        self._file.truncate(content.rfind(b"\n") + 1)

    def keep(self, outcome: Asked) -> None:
        """Writes an outcome, and waits until the disk has it."""
        self._file.write(json.dumps(asdict(outcome)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
