"""The released JSON files as pairs: the splits with their metadata, and the conversations that the VLM was tuned on.

    {clip: {action id: {"image_0": path, "image_1": path, "action": label, "llava_forecast_finetune": text, ...}}}
    {clip: {"height": int, "width": int, ...}}
    [{"image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}, ...]

Nothing is written before every file that a run needs has been looked for: what is missing is counted and named at
once. A pair becomes a manifest row with three columns more, of which `lego generate --parity paper` makes the
released tree: `frame_path`, the target's path in its split folder, `clip_width` and `clip_height` of the metadata.

Formats: card of the data set, and `BolinLai/LEGO: stable_diffusion/dataloader/egogen_dataset.py`.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

from lego_pipeline.atomic import write_text
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.data.released.labels import LabelError, clean_label, split_phrase
from lego_pipeline.vlm.base import DEFAULT_QUESTION, check_question

TEXT_KEY = "llava_forecast_finetune"  # of the enriched descriptions
SOURCES = {"ego4d": "Ego4D, pairs of LEGO", "epic_kitchens": "EPIC-KITCHENS, pairs of LEGO"}
LICENCES = {"ego4d": "Ego4D licence agreement", "epic_kitchens": "CC BY-NC 4.0"}  # of the frames
EGO4D_RATE = 30  # frames a second; a frame's name holds its number
SHARD_ROWS = 256  # pairs of a parquet file
STAMP = "released.json"  # beside the shards: what they were made from
FRAMES = {"image_0": "start frames", "image_1": "target frames"}
FEATURES = {"image": "image features", "text": "text features"}


@dataclass
class Pair:
    """A manifest row without its frames, and the files that belong to it by kind (see `FRAMES`, `FEATURES`)."""

    row: dict[str, Any]
    files: dict[str, Path]


@dataclass
class Pairs:
    """What was found.

    Attributes:
        complete: pairs of which every file is there.
        missing: names by kind: files that are not there or are empty, labels that name no action, bad entries, and so
            on. A pair with one of these is not in `complete`.
    """

    complete: list[Pair] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def report(self, shown: int = 5) -> str:
        """One line: how many of each kind, and the first names."""
        parts = []
        for kind, names in self.missing.items():
            more = f", and {len(names) - shown} more" if len(names) > shown else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:shown])}{more})")
        return "; ".join(parts)

    def listing(self) -> str:
        """All names, one a line, under their kinds."""
        return "".join(f"{kind}:\n" + "".join(f"  {name}\n" for name in names) for kind, names in self.missing.items())


def read_split(
    file: Path,
    frames: Path,
    *,
    split: str,
    dataset: str = "ego4d",
    text_key: str | None = TEXT_KEY,
    metadata: Path | None = None,
    features: Mapping[str, Path] | None = None,
    oddities: Collection[str] = (),
) -> Pairs:
    """Pairs of a released split, in the order of the file.

    Args:
        file: such as `ego4d_val.json`.
        frames: folder that its paths start from, such as `EgoGen/ego4d.fho/val`.
        split: name of the split in the manifest.
        dataset: "ego4d" or "epic_kitchens".
        text_key: of the description; None for pairs without.
        metadata: such as `ego4d_metadata.json`, for the clips' sizes; None leaves them empty.
        features: folders that the VLM's features start from, by "image" and "text".
        oddities: of the labels, see `lego_pipeline.data.released.labels`.

    Raises:
        FileNotFoundError: one of the JSON files or folders is not there.
        ValueError: one of the JSON files is none, or of another form.
    """
    clips = read_json(file, dict)
    sizes = None if metadata is None else read_json(metadata, dict)
    pairs, ids = Pairs(), set()
    for clip, name, entry in tqdm(_entries(clips, pairs), desc="look for files", unit="pair", mininterval=1):
        place = f"{clip}/{name}"
        problem = _bad_paths(entry, ("image_0", "image_1")) or _bad_text(entry, "action")
        row_id = f"{clip}_{name}"
        if problem or row_id in ids or row_id != Path(row_id).name:
            pairs.missing["bad entries"].append(f"{place}: {problem or 'no id of its own'}")
            continue
        ids.add(row_id)
        before = sum(map(len, pairs.missing.values()))
        target = entry["image_1"]
        row = {"id": row_id, "video": clip, "split": split, "frame_path": target, **_origin(dataset)}
        row |= {"description": entry.get(text_key), "clip_width": None, "clip_height": None}
        row |= {f"time_{k}": _time_of(entry[f"image_{k}"], dataset) for k in (0, 1)}
        if text_key is not None and _bad_text(entry, text_key):
            pairs.missing[f"descriptions ({text_key})"].append(place)
        if sizes is not None:
            own = sizes.get(target.split("/")[-3] if target.count("/") >= 2 else clip)
            if isinstance(own, dict) and all(isinstance(own.get(s), int) and own[s] > 0 for s in ("width", "height")):
                row |= {"clip_width": own["width"], "clip_height": own["height"]}
            else:
                pairs.missing["clip sizes in the metadata"].append(place)
        try:
            row["action"] = clean_label(entry["action"], dataset, oddities)
            row["verb"], row["noun"] = split_phrase(row["action"])
            if not row["action"]:
                raise LabelError(f"no action is named: {entry['action']!r}")
        except LabelError as error:
            pairs.missing["unusable labels"].append(f"{place}: {error}")
        files = {kind: frames / entry[column] for column, kind in FRAMES.items()}
        feature = entry["image_0"].replace("jpg", "npy")  # everywhere in the path, as the files were named
        files |= {FEATURES[kind]: folder / feature for kind, folder in (features or {}).items()}
        _look_for(files, pairs)
        if sum(map(len, pairs.missing.values())) == before:
            pairs.complete.append(Pair(row, files))
    return pairs


def read_tuning(
    file: Path,
    frames: Path,
    *,
    split: str = "train",
    dataset: str = "ego4d",
    question_template: str = DEFAULT_QUESTION,
) -> Pairs:
    """Frames and descriptions that the VLM was tuned on, for `train/tune_vlm.py`; there are no target frames.

    Args:
        file: such as `ego4d_for_tuning_forecasting.json`.
        frames: folder that its paths start from, the train folder.
        split, dataset: as for `read_split`.
        question_template: of the human turns, with `{}` for the action, which is read from there.

    Raises:
        FileNotFoundError, ValueError: as `read_split`.
    """
    check_question(question_template)
    before, after = (re.escape(part) for part in question_template.split("{}"))
    question = re.compile(f"{before}(.*?\\S.*?){after}", re.DOTALL)
    pairs, ids = Pairs(), set()
    for number, entry in enumerate(tqdm(read_json(file, list), desc="look for files", unit="frame", mininterval=1), 1):
        texts = _turns(entry)
        problem = "no image and conversation" if texts is None else _bad_paths(entry, ("image",))
        match = None if texts is None else question.fullmatch(texts[0])
        if problem is None and match is None:
            problem = f"the question does not fit the template: {texts[0][:80]!r}"
        elif problem is None and not texts[1]:
            problem = "no answer"
        row_id = (
            "" if problem else str(entry.get("id") or PurePosixPath(entry["image"]).with_suffix("")).replace("/", "_")
        )
        if problem or row_id in ids:
            pairs.missing["bad entries"].append(f"entry {number}: {problem or f'the id {row_id!r} occurs twice'}")
            continue
        ids.add(row_id)
        action = match[1].strip()
        verb, noun = split_phrase(action)
        row = {"id": row_id, "action": action, "verb": verb, "noun": noun, "description": texts[1], "split": split}
        row |= {"video": entry["image"].split("/")[0], "time_0": _time_of(entry["image"], dataset), **_origin(dataset)}
        files = {FRAMES["image_0"]: frames / entry["image"]}
        if _look_for(files, pairs):
            pairs.complete.append(Pair(row, files))
    return pairs


def write_manifest(pairs: Sequence[Pair], folder: Path, made_from: Mapping[str, Any]) -> int:
    """Writes pairs as parquet shards with the frames' files as they are; shards that are there are kept.

    Args:
        pairs: complete ones.
        folder: of the manifest.
        made_from: what the pairs were read from, as JSON holds it; kept beside the shards.

    Returns:
        Number of shards written.

    Raises:
        ValueError: the folder holds shards that were made from something else.
    """
    # Features are no part of a manifest: they may be added to it later.
    frames = [[str(pair.files[kind]) for kind in FRAMES.values() if kind in pair.files] for pair in pairs]
    listed = "\n".join(json.dumps([pair.row, own]) for pair, own in zip(pairs, frames, strict=True))
    stamp = json.dumps({**made_from, "pairs": len(pairs), "sha256": hashlib.sha256(listed.encode()).hexdigest()})
    known = (folder / STAMP).read_text(encoding="utf-8") if (folder / STAMP).is_file() else None
    if known != stamp and (known is not None or any(folder.rglob("*.parquet"))):
        raise ValueError(f"`output` must be a new folder, but {folder} holds a manifest of other files or settings.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STAMP, stamp)
    starts = range(0, len(pairs), SHARD_ROWS)
    written = 0
    for number, start in enumerate(tqdm(starts, desc="write the manifest", unit="shard", mininterval=1)):
        path = folder / f"{pairs[0].row['split']}-{number:06d}.parquet"
        if not path.exists():
            write_shard([_with_frames(pair) for pair in pairs[start : start + SHARD_ROWS]], path)
            written += 1
    return written


def read_json(file: Path, kind: type) -> Any:
    """A JSON file that holds an object (dict) or an array (list).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON in UTF-8, or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` must be a released JSON file, but there is no file; check the path.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{file}` must be JSON, got: {error}; download it again.") from error
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "an array"
        raise ValueError(f"`{file}` must hold {expected}, got {type(content).__name__}; it is another of the files.")
    return content


def _entries(clips: Mapping[str, Any], pairs: Pairs) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for clip, actions in clips.items():
        if not isinstance(actions, dict):
            pairs.missing["bad entries"].append(f"{clip}: no object of actions")
            continue
        for name, entry in actions.items():
            if isinstance(entry, dict):
                yield clip, name, entry
            else:
                pairs.missing["bad entries"].append(f"{clip}/{name}: no object")


def _bad_paths(entry: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What is wrong with the paths of an entry: they have to stay inside their folder."""
    for name in names:
        path = PurePosixPath(entry.get(name) or "") if isinstance(entry.get(name), str) else PurePosixPath()
        if not path.name or path.is_absolute() or ".." in path.parts:
            return f"`{name}` must be a path below the folder of frames, got {entry.get(name)!r}"
    return None


def _bad_text(entry: Mapping[str, Any], name: str) -> str | None:
    is_text = isinstance(entry.get(name), str) and entry[name].strip()
    return None if is_text else f"`{name}` must be a text, got {entry.get(name)!r}"


def _turns(entry: Any) -> tuple[str, str] | None:
    """Question without the image's place, and answer."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        return None
    question, answer = (str(turn.get("value", "")) for turn in turns[:2])
    return question.replace("<image>", "").strip(), answer.strip()


def _origin(dataset: str) -> dict[str, str]:
    return {"source": SOURCES[dataset], "licence": LICENCES[dataset]}


def _time_of(path: str, dataset: str) -> float | None:
    """Seconds in the video, from a name such as frame_00000900.jpg of Ego4D."""
    number = re.fullmatch(r"frame_(\d+)", PurePosixPath(path).stem)
    return int(number[1]) / EGO4D_RATE if number and dataset == "ego4d" else None


def _look_for(files: Mapping[str, Path], pairs: Pairs) -> bool:
    """Whether all files are there and not empty; the others are noted."""
    is_complete = True
    for kind, path in files.items():
        try:
            is_there = os.stat(path).st_size > 0
        except (OSError, ValueError):  # the latter: a name that no file can have
            is_there = False
        if not is_there:
            pairs.missing[kind].append(str(path))
            is_complete = False
    return is_complete


def _with_frames(pair: Pair) -> dict[str, Any]:
    frames = {column: pair.files[kind].read_bytes() for column, kind in FRAMES.items() if kind in pair.files}
    return pair.row | frames
