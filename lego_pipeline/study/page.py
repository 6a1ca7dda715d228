"""Writes a study: `page/`, the folder that raters get, and `key.json`, which stays with who runs the study.

page/ holds index.html (with the study's text, style and script in it), study.json (the same text) and frames/, PNG
files named by tokens. Systems' names, row ids and the metadata of the pictures are in none of them. index.html works
from a file, from `lego study --serve` and from any web server; it asks for nothing outside its folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lego_pipeline.atomic import write_atomically, write_text
from lego_pipeline.study.blinding import digest, new_secret
from lego_pipeline.study.blinding import seal as seal_of
from lego_pipeline.study.questions import frame_file, unreadable

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset

    from lego_pipeline.study.questions import Picture, Question

STUDY_FORMAT, KEY_FORMAT = "lego-study/1", "lego-study-key/1"
PAGE, KEY, VOTES, FRAMES = "page", "key.json", "votes", "frames"  # names in a study's folder
HERE = Path(__file__).parent


@dataclass(kw_only=True)
class Key:
    """What the page doesn't say.

    Attributes:
        study: digest of the study's text.
        mode: frames or descriptions.
        seed: of choice and orders.
        secret: of tokens and seals.
        systems: names of the systems and where they came from.
        questions: by id: row, action, verb, noun, choices (answer -> system or grade), system, expected.
        frames: SHA-256 of each picture by its token.
    """

    study: str
    mode: str
    seed: int
    secret: str
    systems: dict[str, str]
    questions: dict[str, dict[str, Any]]
    frames: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the key with a seal over all of it."""
        content = {"format": KEY_FORMAT, **vars(self)}
        write_text(path, json.dumps({**content, "seal": _key_seal(content)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Key:
        """Reads a key.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no key, or was changed.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"`key` must be the key.json that `lego study` wrote, but there is no file at {path}."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            seal = content.pop("seal")
            if content["format"] != KEY_FORMAT or seal != _key_seal(content):
                raise ValueError("its seal does not fit its content")
            del content["format"]
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`key` must be the key.json that `lego study` wrote, unchanged, got {path}: {error}; restore it."
            ) from error


def secret_in(folder: Path) -> str:
    """The secret of a study that is there, so that the same command makes the same study; else a new one."""
    path = folder / KEY
    return Key.read(path).secret if path.exists() else new_secret()


def write_study(
    folder: Path,
    rows: Dataset,
    questions: Sequence[Question],
    *,
    mode: str,
    title: str,
    seed: int,
    secret: str,
    systems: dict[str, str],
) -> Key:
    """Writes page and key; a study that is there already stays as it is, one that was interrupted is made anew.

    Args:
        folder: of the study.
        rows: of the manifest, images undecoded.
        questions: in the page's order.
        mode, title: as the page shows them.
        seed, secret: that the questions were made with.
        systems: names, and where they came from.

    Raises:
        ValueError: the folder has another study, or a picture can't be read.
    """
    from tqdm.auto import tqdm

    text = study_text(questions, mode=mode, title=title, seed=seed)
    key = Key(
        study=digest(text),
        mode=mode,
        seed=seed,
        secret=secret,
        systems=systems,
        questions={question.id: _noted(question) for question in questions},
    )
    page, path = folder / PAGE, folder / KEY
    there = Key.read(path) if path.exists() else None
    if there is not None and (there.study, there.questions) != (key.study, key.questions):
        raise ValueError(
            f"`--output` must be a new folder for a new study, but {folder} has another one, whose votes would be "
            "lost; choose another folder."
        )
    pictures = {name: picture for question in questions for name, picture in question.pictures.items()}
    # In the order of the tokens, as the files' times would tell which system is which.
    for name, picture in tqdm(sorted(pictures.items()), desc="frames", unit="frame", disable=None):
        data = _png(_picture(rows, picture))
        key.frames[name] = hashlib.sha256(data).hexdigest()
        if there is not None and there.frames[name] != key.frames[name]:
            raise ValueError(
                f"`--output` must be a new folder, as a picture ({picture.path or picture.column}) is not the one "
                f"that the study in {folder} was made with."
            )
        place = page / FRAMES / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, lambda unfinished, data=data: unfinished.write_bytes(data))
    for place in (page / FRAMES).glob("*.png"):
        if place.stem not in key.frames:  # of an attempt that was interrupted
            place.unlink()
    key.write(path)
    write_text(page / "study.json", text)
    write_text(page / "index.html", html(text))
    return key


def study_text(questions: Sequence[Question], *, mode: str, title: str, seed: int) -> str:
    """The study as the page reads it: JSON in ASCII without `<`, so that it can stand in HTML as it is."""
    shown = []
    for question in questions:
        entry: dict[str, Any] = {"id": question.id, "action": question.action, "input": question.input}
        entry |= {"choices": sorted(question.choices) if mode == "frames" else list(question.choices)}
        if question.target is not None:
            entry["target"] = question.target
        if question.description is not None:
            entry["description"] = question.description
        shown.append(entry)
    content = {"format": STUDY_FORMAT, "mode": mode, "title": title, "seed": seed, "questions": shown}
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def html(text: str) -> str:
    """index.html with a study's text in it."""
    parts = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    parts |= {"title": escape(json.loads(text)["title"]), "digest": digest(text), "study": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], parts["html"])


def check_page(folder: Path, key: Key) -> None:
    """Refuse a study of which a file was changed or is missing.

    Raises:
        ValueError: with the first such file.
    """
    text = folder / PAGE / "study.json"
    wanted = {text: key.study, **{folder / PAGE / FRAMES / f"{name}.png": sha for name, sha in key.frames.items()}}
    for path, sha in wanted.items():
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            raise ValueError(
                f"`--output` must be a study as `lego study` wrote it, but {path} was changed or is missing; "
                "make it again with the command that made it."
            )


def _noted(question: Question) -> dict[str, Any]:
    """What the key says of a question."""
    names = ("row", "action", "verb", "noun", "choices", "system")
    return {name: getattr(question, name) for name in names} | {"expected": list(question.expected)}


def _picture(rows: Dataset, picture: Picture) -> PIL.Image.Image:
    """The picture, upright RGB, of the size that it is shown in.

    Raises:
        ValueError: it can't be read.
    """
    import PIL.Image

    from lego_pipeline.images import read_image

    if picture.path is not None:
        image = read_image(picture.path)
    else:
        assert picture.row is not None
        image = _frame(rows, picture.row, picture.column)
    if picture.like is not None:
        size = _frame(rows, picture.like, "image_0").size
        if size != image.size:
            image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    return image


def _frame(rows: Dataset, number: int, column: str) -> PIL.Image.Image:
    """A frame of the manifest."""
    import PIL.Image

    from lego_pipeline.images import to_rgb

    row = rows[number]
    try:
        with PIL.Image.open(io.BytesIO(frame_file(row, column))) as image:
            return to_rgb(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(unreadable(row, column, error)) from error


def _png(image: PIL.Image.Image) -> bytes:
    """A PNG file of the pixels and nothing else: no text, times or profile."""
    data = io.BytesIO()
    image.info.clear()
    image.save(data, "PNG")
    return data.getvalue()


def _key_seal(content: dict[str, Any]) -> str:
    return seal_of(content["secret"], json.dumps(content, sort_keys=True))
