"""What raters are asked: one question for each row of a manifest (and system, where descriptions are rated).

Two modes. In "frames" a rater picks, of all systems' pictures for one frame and action, the one that shows the action
best. In "descriptions" a rater says of one system's description whether it is right, partly right, wrong or
hallucinated, with the frames beside it. Attention checks have the same form and a known answer: the true frame among
frames of other actions, or the description of another action.

Source: the LEGO paper's user studies: the share of systems picked as best, and the share of descriptions that are
aligned with the frames, with hallucinations counted among the others.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lego_pipeline.generated import read_generated
from lego_pipeline.study.blinding import token
from lego_pipeline.study.systems import find_descriptions

if TYPE_CHECKING:
    from datasets import Dataset

GRADES = ("right", "partly", "wrong", "hallucinated")
FALSE_GRADES = ("wrong", "hallucinated")  # right answers where the description is another action's
FACTS = ("id", "action", "verb", "noun", "description")
FRAME_PATH = "frame_path"  # column of manifests of released data, by which released pictures are found
MANIFEST = "manifest"  # name of the manifest's own descriptions


@dataclass(frozen=True)
class Picture:
    """Where a picture comes from, and what size it is brought to.

    Attributes:
        row: number of a row, whose `column` it is; without `path`.
        column: image_0 or image_1.
        path: of a system's picture.
        like: number of the row whose input frame's size it gets, so that sizes tell nothing; None leaves it.
    """

    row: int | None = None
    column: str = "image_0"
    path: Path | None = None
    like: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its answers.

    Attributes:
        id: its token.
        row: id of the manifest's row.
        action, verb, noun: of the row.
        choices: what can be answered: token of a picture -> system, or grade -> grade.
        pictures: all that the page shows, by token.
        input: token of the input frame.
        target: token of the true frame, where descriptions are rated and there is one.
        system: whose description is rated.
        description: the one.
        expected: answers that an attention check takes as right; empty for a question of the study.
    """

    id: str
    row: str
    action: str
    verb: str | None
    noun: str | None
    choices: dict[str, str]
    pictures: dict[str, Picture]
    input: str
    target: str | None = None
    system: str | None = None
    description: str | None = None
    expected: tuple[str, ...] = ()


class Chooser:
    """Chooses rows and makes questions of them.

    Args:
        rows: of the manifest, images undecoded.
        secret: of the study, for the tokens.
        seed: chooses the rows.
    """

    def __init__(self, rows: Dataset, secret: str, seed: int):
        self.rows, self.secret = rows, secret
        self.facts: list[dict[str, Any]] = rows.select_columns(list(FACTS)).to_list()
        self.has_target = _has_target(rows)
        self.random = random.Random(seed)

    def frames(self, systems: Mapping[str, Path], count: int | None, checks: int) -> list[Question]:
        """Questions of which system's picture is best.

        Args:
            systems: names and folders.
            count: of questions; None asks of all rows that every system has a picture for.
            checks: number of attention checks.

        Raises:
            ValueError: fewer than two systems, too few rows, or pictures that were made from others.
        """
        if len(systems) < 2:
            raise ValueError(f"`--systems` must be at least two to be compared, got {len(systems)}.")
        found = self._pictures(systems)
        chosen = self._choose(found, count)
        questions = [self._frames_question(number, found) for number in chosen]
        return self._shuffled(questions + self._frame_checks(chosen, len(systems), checks))

    def descriptions(self, sources: Mapping[str, Path], count: int | None, checks: int) -> list[Question]:
        """Questions of how good a description is, one for each row and system.

        Args:
            sources: names, and folders or .jsonl files with descriptions; none takes the manifest's.
            count: of rows; None asks of all that every system has a description for.
            checks: number of attention checks.

        Raises:
            ValueError: no descriptions, or too few rows.
        """
        found = {name: find_descriptions(source) for name, source in sources.items()}
        if not found:
            found = {MANIFEST: {row["id"]: row["description"] for row in self.facts if row["description"]}}
        chosen = self._choose(found, count)
        questions = [
            self._description_question(number, name, texts[self.facts[number]["id"]])
            for number in chosen
            for name, texts in found.items()
        ]
        return self._shuffled(questions + self._description_checks(chosen, found, checks))

    def _pictures(self, systems: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
        """Of each system its pictures by row id."""
        ids = [row["id"] for row in self.facts]
        paths = self.rows[FRAME_PATH][:] if FRAME_PATH in self.rows.column_names else [None] * len(ids)
        rows = [
            {**fact, "frame_path": path, "image_sha256": hashlib.sha256(frame_file(row, "image_0")).hexdigest()}
            for fact, path, row in zip(self.facts, paths, self.rows.select_columns(["id", "image_0"]), strict=True)
        ]
        found = {name: read_generated(name, folder, rows, "--systems").paths for name, folder in systems.items()}
        return {
            name: {row_id: path for row_id, path in zip(ids, places, strict=True) if path is not None}
            for name, places in found.items()
        }

    def _choose(self, found: Mapping[str, Mapping[str, Any]], count: int | None) -> list[int]:
        """Numbers of rows that every system has something for."""
        numbers = [n for n, row in enumerate(self.facts) if all(row["id"] in made for made in found.values())]
        lacking = {name: len(self.facts) - len(made.keys() & {row["id"] for row in self.facts})
                   for name, made in found.items()}  # fmt: skip
        described = ", ".join(f"{name} lacks {number}" for name, number in lacking.items() if number)
        if not numbers or (count is not None and count > len(numbers)):
            raise ValueError(
                f"`--questions` must be at most the rows that every system has something for, {len(numbers)} of "
                f"{len(self.facts)}{f' ({described})' if described else ''}, got {count or 'all of them'}; make what "
                "lacks with `lego generate --data`."
            )
        if described and count is None:
            warnings.warn(
                f"{len(self.facts) - len(numbers)} of {len(self.facts)} rows are left out: {described}.", stacklevel=3
            )
        return numbers if count is None else self.random.sample(numbers, count)

    def _frames_question(self, number: int, found: Mapping[str, Mapping[str, Path]]) -> Question:
        row_id = self.facts[number]["id"]
        made = {name: Picture(path=pictures[row_id], like=number) for name, pictures in found.items()}
        tokens = {name: token(self.secret, "picture", row_id, name) for name in made}
        return self._question(
            number,
            "frames",
            choices={tokens[name]: name for name in made},
            pictures={tokens[name]: picture for name, picture in made.items()},
        )

    def _frame_checks(self, used: Sequence[int], pictures: int, count: int) -> list[Question]:
        """The true frame among frames of other actions."""
        checks = []
        for number in self._check_rows(used, count):
            own = self.facts[number]
            others = [n for n, row in enumerate(self.facts) if row["action"] != own["action"] and self.has_target[n]]
            if len(others) < pictures - 1:
                raise ValueError(
                    "`--attention-checks` must be 0 for this manifest, which has too few other actions with `image_1` "
                    f"to mix with {own['action']!r}."
                )
            shown = [number, *self.random.sample(others, pictures - 1)]
            tokens = [token(self.secret, "check", own["id"], self.facts[n]["id"]) for n in shown]
            checks.append(
                self._question(
                    number,
                    "check",
                    choices=dict.fromkeys(tokens, ""),
                    pictures={
                        name: Picture(row=n, column="image_1", like=number)
                        for name, n in zip(tokens, shown, strict=True)
                    },
                    expected=(tokens[0],),
                )
            )
        return checks

    def _description_question(self, number: int, system: str | None, text: str, **more: Any) -> Question:
        row_id = self.facts[number]["id"]
        target = token(self.secret, "target", row_id) if self.has_target[number] else None
        return self._question(
            number,
            "check" if system is None else f"description {system}",
            choices=dict(zip(GRADES, GRADES, strict=True)),
            pictures={} if target is None else {target: Picture(row=number, column="image_1")},
            target=target,
            system=system,
            description=text,
            **more,
        )

    def _description_checks(
        self, used: Sequence[int], found: Mapping[str, Mapping[str, str]], count: int
    ) -> list[Question]:
        """The description of an action with another verb and another noun."""
        checks = []
        for number in self._check_rows(used, count, needs_target=False):
            own = self.facts[number]
            system = self.random.choice(sorted(found))
            texts = [
                found[system][row["id"]]
                for row in self.facts
                if row["id"] in found[system] and all(row[part] != own[part] for part in _parts(own))
            ]
            if not texts:
                raise ValueError(
                    "`--attention-checks` must be 0 for this manifest, which has no description of an action "
                    f"that differs in verb and noun from {own['action']!r}."
                )
            text = self.random.choice(texts)
            checks.append(self._description_question(number, None, text, expected=FALSE_GRADES))
        return checks

    def _check_rows(self, used: Sequence[int], count: int, needs_target: bool = True) -> list[int]:
        """Rows for attention checks, those that no question is of before the others."""
        rest = sorted(set(range(len(self.facts))) - set(used))
        numbers = self.random.sample(rest, len(rest)) + self.random.sample(sorted(used), len(used))
        found = [number for number in numbers if not needs_target or self.has_target[number]][:count]
        if len(found) < count:
            raise ValueError(
                f"`--attention-checks` must be at most the rows of the manifest with `image_1`, {len(found)}, got "
                f"{count}."
            )
        return found

    def _question(self, number: int, kind: str, *, pictures: dict[str, Picture], **more: Any) -> Question:
        row = self.facts[number]
        shown = token(self.secret, "input", row["id"])
        return Question(
            id=token(self.secret, "question", kind, row["id"]),
            row=row["id"],
            action=row["action"],
            verb=row["verb"],
            noun=row["noun"],
            pictures={shown: Picture(row=number), **pictures},
            input=shown,
            **more,
        )

    @staticmethod
    def _shuffled(questions: Sequence[Question]) -> list[Question]:
        """In the order of their tokens, so that attention checks have no place of their own."""
        return sorted(questions, key=lambda question: question.id)


def frame_file(row: Mapping[str, Any], column: str) -> bytes:
    """The file of a frame, undecoded.

    Raises:
        ValueError: it can't be read.
    """
    file = row[column]
    try:
        return Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
    except OSError as error:
        raise ValueError(unreadable(row, column, error)) from error


def unreadable(row: Mapping[str, Any], column: str, error: Exception) -> str:
    """Message about a frame."""
    return f"`{column}` of row {row['id']} must be an image that can be read, got: {error}; put it in again."


def _has_target(rows: Dataset) -> list[bool]:
    """Whether each row has a true frame."""
    found: list[bool] = []
    for table in rows.select_columns(["image_1"]).with_format("arrow").iter(256):
        fields = [field.is_valid().to_pylist() for field in table.column("image_1").flatten()]  # bytes, path
        found += [any(row) for row in zip(*fields, strict=True)]
    return found


def _parts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns that tell two actions apart."""
    return ("verb", "noun") if row["verb"] and row["noun"] else ("action",)
