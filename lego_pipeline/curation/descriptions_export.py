"""Described pairs as a manifest, and as the tuning file of LLaVA's own training code.

The LLaVA file is a list of `{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}`,
the layout that `BolinLai/LEGO: vllm/llava/train/train.py` reads, with the frames beside it as files.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import PIL.Image
from datasets import Dataset, Image
from tqdm.auto import tqdm

from lego_pipeline.atomic import write_atomically, write_text
from lego_pipeline.data.manifest import IMAGES, write_shard
from lego_pipeline.vlm.base import ask

SHARD = 100  # pairs


def write_manifest(folder: Path, rows: Dataset, split: str, descriptions: Mapping[str, str]) -> int:
    """Writes the described rows of a split as shards `folder/split/000000.parquet`, ...; the others are left out.

    All shards are written anew: a row whose id, label and boxes stayed may have got other frames. Those that are not
    needed any more are removed last. Frames keep the bytes of their files.

    Args:
        folder: of the manifest.
        rows: of `read_manifest`, of one split.
        split: its name, that of the folder.
        descriptions: by id.

    Returns:
        The number of rows.
    """
    described = [number for number, row_id in enumerate(rows["id"][:]) if row_id in descriptions]
    starts = range(0, len(described), SHARD)
    shards = {folder / split / f"{start:06d}.parquet": described[start : start + SHARD] for start in starts}
    for path, numbers in tqdm(shards.items(), desc=f"write {split}", disable=not shards, mininterval=5):
        chosen = [{**row, "description": descriptions[row["id"]]} for row in _undecoded(rows, numbers)]
        write_shard(chosen, path)
    for path in (folder / split).glob("*.parquet"):
        if path not in shards:
            path.unlink()
    return len(described)


def _undecoded(rows: Dataset, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """Some rows, their frames as the bytes of the files that they are in."""
    chosen = rows.select(numbers)
    images = [name for name in IMAGES if name in rows.column_names]
    for name in images:
        chosen = chosen.cast_column(name, Image(decode=False))
    for row in chosen:
        row = dict(row)
        for name in images:
            if row[name] is not None:
                row[name] = row[name]["bytes"] or Path(row[name]["path"]).read_bytes()
        yield row


def write_llava(folder: Path, rows: Dataset, split: str, descriptions: Mapping[str, str], question: str) -> Path:
    """Writes `folder/split.json` and the input frames of the described rows below `folder/images/split`.

    Args:
        folder: of file and frames.
        rows, split, descriptions: as for `write_manifest`.
        question: template of what is asked about an action.

    Returns:
        The JSON file; its images are named relative to `folder`.
    """
    entries = []
    described = [number for number, row_id in enumerate(rows["id"][:]) if row_id in descriptions]
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    for row in _undecoded(rows.select_columns(["id", "image_0", "action"]), described):
        with PIL.Image.open(io.BytesIO(row["image_0"])) as picture:
            suffix = {"jpeg": "jpg"}.get((picture.format or "").lower(), (picture.format or "").lower())
        name = f"images/{split}/{quote(row['id'], safe=' ')}.{suffix}"
        write_atomically(folder / name, lambda unfinished, data=row["image_0"]: unfinished.write_bytes(data))
        said = [("human", f"<image>\n{ask(question, row['action'])}"), ("gpt", descriptions[row["id"]])]
        turns = [{"from": speaker, "value": text} for speaker, text in said]
        entries.append({"id": row["id"], "image": name, "conversations": turns})
    file = folder / f"{split}.json"
    write_text(file, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return file
