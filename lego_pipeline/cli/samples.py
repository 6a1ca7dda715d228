"""What `lego generate` is asked for: files and folders of `--image`, rows of `--actions-file`, their seeds."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(kw_only=True)
class Sample:
    """One picture to make: a row of the actions file, or what the flags say."""

    id: str
    image: Path
    action: str | None = None
    description: str | None = None
    seed: int = 0
    problem: str | None = None  # why it cannot be made, found on reading the row


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and the image files in the folders, sorted by name.

    Raises:
        ValueError: a folder without image files.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"`--image` {path} must hold image files ({', '.join(IMAGE_SUFFIXES)}), got none.")
        found += files
    return found


def read_actions(path: Path, folders: Sequence[Path], seed: int) -> list[Sample]:
    """Samples of an actions file; a bad row becomes a sample with a problem, so that the others can go on.

    Args:
        path: CSV with a head line or JSONL; columns image, action and, if wanted, description, seed, id.
        folders: at most one folder that the images are in; without it they are beside the file.
        seed: that the seeds of rows without one are derived from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither CSV nor JSONL, has no column `image`, no rows, or `folders` is not one folder.
    """
    if len(folders) > 1 or (folders and not folders[0].is_dir()):
        raise ValueError(
            "`--image` must be one folder or be left out beside `--actions-file`, whose rows name images."
        )
    if not path.is_file():
        raise FileNotFoundError(f"`--actions-file` must be a CSV or JSONL file, but there is no file at {path}.")
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"`--actions-file` must end in .csv or .jsonl, got {path}.")
    folder = folders[0] if folders else path.parent
    try:
        samples = [_sample(row, number, path, folder, seed) for number, row in read(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"`--actions-file` {path} must be UTF-8 text, got: {error}.") from error
    if not samples:
        raise ValueError(f"`--actions-file` {path} must hold at least one row, got none.")
    return samples


def check_ids(samples: Sequence[Sample]) -> None:
    """Refuse samples that would be written to the same file."""
    counts = Counter(sample.id for sample in samples)
    twice = sorted(id for id, count in counts.items() if count > 1)
    if twice:
        raise ValueError(
            f"every picture must have an id of its own, but these occur more than once: {', '.join(twice[:5])}; "
            "use an actions file with an `id` column."
        )


def check_seed(seed: int, name: str) -> None:
    """Refuse what is no seed of a `torch.Generator`."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"`{name}` must be a whole number from 0 to 2**63 - 1, got {seed}.")


def derive_seed(seed: int, id: str) -> int:
    """Seed of one sample of a batch: its own, and the same whatever else is in the batch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:4], "big")


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or "image" not in reader.fieldnames:
            found = ", ".join(reader.fieldnames or ()) or "an empty file"
            raise ValueError(f"`--actions-file` {path} must start with the column names image,action, got {found}.")
        for row in reader:
            yield reader.line_num, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and objects; a line that is no JSON comes as it is."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError:
                    yield number, line.strip()


def _sample(row: Any, number: int, path: Path, folder: Path, seed: int) -> Sample:
    """The sample of one row, with what is wrong with it."""
    place = f"{path}, line {number}"
    sample = Sample(id=f"line-{number}", image=path)
    if not isinstance(row, dict):
        sample.problem = f"{place} must be a JSON object with `image` and `action`, got {str(row)[:80]!r}."
        return sample
    image, action, description, id, given = (
        str("" if row.get(key) is None else row[key]).strip()
        for key in ("image", "action", "description", "id", "seed")
    )
    if not image or not (action or description):
        sample.problem = f"{place} must name an `image` and an `action` or `description`."
        return sample
    id = id or "-".join(filter(None, (Path(image).stem, re.sub(r"[^a-z0-9]+", "-", action.lower()).strip("-"))))
    if id != Path(id).name or id.startswith("."):
        sample.problem = f"{place}: `id` must be usable as a file name, got {id!r}."
        return sample
    sample = Sample(id=id, image=folder / image, action=action or None, description=description or None)
    try:
        sample.seed = int(given) if given else derive_seed(seed, id)
        check_seed(sample.seed, "seed")
    except ValueError:
        sample.problem = f"{place}: `seed` must be a whole number from 0 to 2**63 - 1, got {given!r}."
    return sample
