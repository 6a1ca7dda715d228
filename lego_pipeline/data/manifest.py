"""The manifest: one row per pair of frames, the only form in which pairs travel between the stages.

A row says which frame an action starts from (`image_0`), which frame shows it (`image_1`), what was asked (`action`)
and what is known about the pair. On disk a manifest is parquet shards that hold the frames as PNG bytes, or image
files beside a `metadata.jsonl`; `datasets.load_dataset` reads both as they are. Curation, the rendered kitchen and
user folders write this form; training, generation and evaluation read it and nothing else.

| column | content |
|---|---|
| id | unique name of the pair |
| image_0, image_1 | input frame and target frame; `image_1` may be absent where only generation is asked for |
| action, verb, noun | the label "open drawer" and its two parts |
| description | the action in a full sentence, as the VLM is tuned to write it |
| slots | JSON object of further facts (hand, place, grasp, ...) |
| boxes_0, boxes_1 | list of {name, x0, y0, x1, y1} in fractions of the frame's width and height, y down |
| video, time_0, time_1 | the video that the frames come from and their times in seconds |
| split | train, val or test |
| source, licence | where the frames come from and under which licence |
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Image, List, Value
from datasets.table import table_cast
from PIL import Image as PILImage

from lego_pipeline.atomic import write_atomically

BOX = {
    "name": Value("string"),
    "x0": Value("float32"),
    "y0": Value("float32"),
    "x1": Value("float32"),
    "y1": Value("float32"),
}
FEATURES = Features(
    {
        "id": Value("string"),
        "image_0": Image(),
        "image_1": Image(),
        "action": Value("string"),
        "verb": Value("string"),
        "noun": Value("string"),
        "description": Value("string"),
        "slots": Value("string"),
        "boxes_0": List(BOX),
        "boxes_1": List(BOX),
        "video": Value("string"),
        "time_0": Value("float32"),
        "time_1": Value("float32"),
        "split": Value("string"),
        "source": Value("string"),
        "licence": Value("string"),
    }
)
REQUIRED = ("id", "image_0", "action")
IMAGES = ("image_0", "image_1")
MAKE_ONE = "`python -m examples.kitchen.render --pairs 1000 --split train --out DIR` makes one"
IN_MEMORY = 64 * 2**20  # bytes of parquet up to which a manifest is held in memory
MAX_REPORTED = 10  # problems named in one error; the rest are counted


def write_shard(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows as one parquet shard that either is there complete or not at all.

    Args:
        rows: one dict a pair. `id`, `image_0` and `action` are required, other columns of `FEATURES` may be missing
            (they become null), further ones are kept. Images are PIL images (stored as PNG, whatever they were loaded
            from) or bytes of an image file (stored as they are); `slots` is a JSON string or a dict.
        path: the shard, `.parquet`; its folder is made.

    Raises:
        ValueError: no rows, or a row without a required value.
        TypeError: an image that is neither.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"`rows` must hold at least one row, got none for {path}; do not write empty shards.")
    rows = [_encoded(row, number) for number, row in enumerate(rows)]
    problems = _problems(rows, path)
    if problems:
        raise ValueError(_report(path, problems))
    features = Features(FEATURES)
    extra = [{k: v for k, v in row.items() if k not in FEATURES} for row in rows]
    names = list(dict.fromkeys(name for row in extra for name in row))
    if names:
        table = pa.Table.from_pydict({name: [row.get(name) for row in extra] for name in names})
        features.update(Features.from_arrow_schema(table.schema))
    table = pa.Table.from_pydict(
        {name: [row.get(name) for row in rows] for name in features}, schema=features.arrow_schema
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda unfinished: pq.write_table(table, unfinished, compression="zstd"))


def read_manifest(path: str | os.PathLike, split: str | None = None) -> Dataset:
    """Read a manifest, whatever its form on disk, and check its rows.

    Args:
        path: a folder of parquet shards (searched with its subfolders), one parquet file, or a folder with
            `metadata.jsonl` and the image files that it names in `image_0_file_name` and `image_1_file_name`.
        split: keep only the rows of this split; None keeps all.

    Returns:
        A `datasets.Dataset` with all columns of `FEATURES` (null where the files have none) and the unknown ones of
        the files, in the order of the file names and rows; images are decoded to PIL when a row is read.

    Raises:
        FileNotFoundError: there is no manifest at `path`.
        ValueError: missing columns or bad rows, each named with its file and row (from 1); or no row of `split`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a manifest, but there is nothing at {path}; {MAKE_ONE}.")
    if (path / "metadata.jsonl").is_file():
        dataset, splits = _read_metadata(path / "metadata.jsonl")
    elif path.is_file() and path.suffix == ".jsonl":
        dataset, splits = _read_metadata(path)
    else:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*.parquet") if not f.name.startswith("."))
        if not files:
            raise FileNotFoundError(
                f"`path` must hold parquet shards or a metadata.jsonl, but the folder {path} has neither; {MAKE_ONE}."
            )
        dataset, splits = _read_parquet(files, split)
    if split is None:
        return dataset
    keep = [number for number, value in enumerate(splits) if value == split]
    if not keep:
        known = ", ".join(sorted({str(value) for value in splits}))
        raise ValueError(f"`split` must be a split of {path}, got {split!r}; this manifest has: {known}.")
    return dataset if len(keep) == len(splits) else dataset.select(keep)


def _read_parquet(files: list[Path], split: str | None) -> tuple[Dataset, list[str | None]]:
    """Dataset over the shards that hold rows of `split` (all shards if none does), and the split of each row."""
    features, facts = Features(FEATURES), []
    for file in files:
        try:
            shard = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is no readable parquet file ({error}); write it again.") from error
        with shard:
            missing = [name for name in REQUIRED if name not in shard.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{file} must have the columns {', '.join(REQUIRED)}, but lacks {', '.join(missing)}; "
                    f"it has {', '.join(shard.schema_arrow.names)}."
                )
            for name, feature in Features.from_arrow_schema(shard.schema_arrow).items():
                features.setdefault(name, feature)
            light = [
                name for name in ("id", "action", "split", "boxes_0", "boxes_1") if name in shard.schema_arrow.names
            ]
            rows = shard.read(columns=light).to_pylist()
            for name in IMAGES:
                if name in shard.schema_arrow.names:
                    absent = _rows_without_image(shard, name)
                    for number, row in enumerate(rows):
                        row[name] = None if number in absent else True
            facts.append((file, rows))
    problems = [problem for file, rows in facts for problem in _problems(rows, file)]
    places = [(row["id"], f"{file}, row {number}") for file, rows in facts for number, row in enumerate(rows, start=1)]
    problems += _duplicates(places)
    if problems:
        raise ValueError(_report(files[0].parent, problems))
    wanted = [(file, rows) for file, rows in facts if any(row.get("split") == split for row in rows)] or facts
    return _load([file for file, _ in wanted], features), [row.get("split") for _, rows in wanted for row in rows]


def _load(files: list[Path], features: Features) -> Dataset:
    """Small manifests are read into memory; large ones go through the memory-mapped cache of `datasets` on disk."""
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        return Dataset.from_parquet([str(file) for file in files], features=features)
    tables = [table_cast(pq.read_table(file), features.arrow_schema) for file in files]
    return Dataset(pa.concat_tables(tables), info=DatasetInfo(features=features))


def _rows_without_image(shard: pq.ParquetFile, name: str) -> set[int]:
    """Numbers of the rows whose image has neither bytes nor a file; bytes are read only if the footer counts nulls."""
    absent, first = set(), 0
    for group in range(shard.num_row_groups):
        meta = shard.metadata.row_group(group)
        columns = [meta.column(i) for i in range(meta.num_columns)]
        data = [column for column in columns if column.path_in_schema == f"{name}.bytes"]
        statistics = data[0].statistics if data else None
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            for number, value in enumerate(shard.read_row_group(group, columns=[name]).column(name).to_pylist()):
                bytes_, file = (value or {}).get("bytes"), (value or {}).get("path")
                if bytes_ is None and not (file and os.path.isfile(file)):
                    absent.add(first + number)
        first += meta.num_rows
    return absent


def _read_metadata(file: Path) -> tuple[Dataset, list[str | None]]:
    """Dataset over a metadata.jsonl, and the split of each row."""
    rows, problems, places = [], [], []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"{file}, row {number}: no JSON ({error})")
                continue
            if not isinstance(row, dict):
                problems.append(f"{file}, row {number}: a JSON object is expected, got {type(row).__name__}")
                continue
            for name in IMAGES:
                image = row.pop(f"{name}_file_name", None)
                row[name] = str(file.parent / image) if image else None
                if image and not os.path.isfile(row[name]):
                    problems.append(f"{file}, row {number}: {name}_file_name names {image}, which is not there")
            if isinstance(row.get("slots"), dict):
                row["slots"] = json.dumps(row["slots"])
            rows.append(row)
            places.append((row.get("id"), f"{file}, row {number}"))
            problems += _problems([row], file, first=number)
    if not rows and not problems:
        raise ValueError(f"{file} must hold at least one row, got an empty file; {MAKE_ONE}.")
    problems += _duplicates(places)
    if problems:
        raise ValueError(_report(file, problems))
    names = list(dict.fromkeys([*FEATURES, *(name for row in rows for name in row)]))
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = Features(FEATURES)
    extra = [name for name in names if name not in FEATURES]
    if extra:
        features.update(Dataset.from_dict({name: columns[name] for name in extra}).features)
    return Dataset.from_dict(columns, features=features), columns["split"]


def _encoded(row: dict, number: int) -> dict:
    """The row as it is stored: images as PNG bytes, slots as JSON text."""
    row = dict(row)
    for name in IMAGES:
        image = row.get(name)
        if isinstance(image, PILImage.Image):
            png = io.BytesIO()
            image.save(png, "PNG")
            row[name] = {"bytes": png.getvalue(), "path": None}
        elif isinstance(image, bytes):
            row[name] = {"bytes": image, "path": None}
        elif image is not None:
            raise TypeError(f"`{name}` of row {number + 1} must be a PIL image or bytes, got {type(image).__name__}.")
    if isinstance(row.get("slots"), dict):
        row["slots"] = json.dumps(row["slots"])
    return row


def _problems(rows: list[dict], file: Path, first: int = 1) -> list[str]:
    """What is wrong with these rows of one file."""
    problems = []
    for number, row in enumerate(rows, start=first):
        for name in REQUIRED:
            if not row.get(name):
                problems.append(f"{file}, row {number}: `{name}` is missing or empty")
        for name in ("boxes_0", "boxes_1"):
            for box in row.get(name) or []:
                if not _is_box(box):
                    problems.append(
                        f"{file}, row {number}: `{name}` needs a name, 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "
                        f"got {box}"
                    )
    return problems


def _is_box(box: dict) -> bool:
    """Whether a box has a name and its corners are ordered fractions (with the slack of a float32)."""
    try:
        x0, y0, x1, y1 = (float(box[side]) for side in ("x0", "y0", "x1", "y1"))
    except (KeyError, TypeError, ValueError):
        return False
    slack = 1e-6
    return bool(box.get("name")) and -slack <= x0 < x1 <= 1 + slack and -slack <= y0 < y1 <= 1 + slack


def _duplicates(places: list[tuple[str | None, str]]) -> list[str]:
    """Ids that occur a second time, from pairs of an id and where it stands."""
    seen: dict[str, str] = {}
    problems = []
    for name, place in places:
        if name and seen.setdefault(name, place) != place:
            problems.append(f"{place}: the id {name!r} is already that of {seen[name]}")
    return problems


def _report(path: Path, problems: list[str]) -> str:
    """One message for all problems."""
    rest = len(problems) - MAX_REPORTED
    lines = problems[:MAX_REPORTED] + ([f"and {rest} more"] if rest > 0 else [])
    return (
        f"{path} has {len(problems)} bad row{'s' if len(problems) > 1 else ''}; correct or remove them:\n  "
        + "\n  ".join(lines)
    )
