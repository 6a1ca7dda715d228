"""What the subcommands write: pictures with their parameters in the PNG text, and generation.jsonl beside them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image

PNG_KEY = "lego"  # name of the PNG text with the parameters
RECORDS = "generation.jsonl"


def check_output(path: Path, suffix: str, *, folder: bool = False) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Args:
        path: what the user named.
        suffix: how a file must end, such as ".png".
        folder: whether a folder is right as well, a name without suffix or one that is a folder already.

    Raises:
        ValueError: the suffix is another, or something of the other kind is there already.
        NotADirectoryError: a parent is a file.
    """
    if path.suffix.lower() == suffix:
        if path.is_dir():
            raise ValueError(
                f"`--output` must be a file, but {path} is a folder; leave out the {suffix} for a folder."
            )
    elif not folder or (path.suffix and not path.is_dir()):
        raise ValueError(f"`--output` must end in {suffix}{' or name a folder' if folder else ''}, got {path}.")
    elif path.is_file():
        raise ValueError(f"`--output` must end in {suffix} or name a folder, but {path} is a file.")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"`--output` must be in a folder, but {parent} is a file.")


def write_png(path: Path, picture: PIL.Image.Image, record: dict[str, Any]) -> None:
    """A PNG file with the record as JSON in the text `lego`, there complete or not at all."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(PNG_KEY, json.dumps(record))
    data = io.BytesIO()
    picture.save(data, "PNG", pnginfo=text)
    write_bytes(path, data.getvalue())


def read_png_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG file; None if there is no complete picture with one."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as picture:
            picture.load()
            record = json.loads(picture.info.get(PNG_KEY, "null"))
    except (OSError, SyntaxError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a generation.jsonl by id; a line that an interruption cut off is left out."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, TypeError, KeyError):
            continue
    return records


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A generation.jsonl with these lines, there complete or not at all."""
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line; an older one of the same id stays until `write_records`."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """A file, its folders made, there complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
