"""Files that are written whole or not at all, whatever moment a kill or a power cut comes at."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path`, then syncs and renames it, so that `path` is whole or absent."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def sync_folder(folder: Path) -> None:
    """Makes the renaming in a folder last through a power cut, where the system can open folders (Windows can't)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
