"""Votes files: what the page saves, checked before anything is counted.

{"format": "lego-votes/1", "study": digest of the study's text, "rater": code,
 "answers": [{"question": id, "order": choices as they were shown, "choice": the answer, "ms": time taken,
              "at": milliseconds since 1970}],
 "digest": SHA-256, see `lego_pipeline.study.blinding`, "seal": of the local server, if it saved them}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lego_pipeline.study.blinding import RATER, VOTES_FORMAT, digest, in_order, is_same, seal, votes_text
from lego_pipeline.study.page import Key

FIELDS = {"question": str, "order": list, "choice": str, "ms": int, "at": int}  # of an answer
MAX_NAMED = 5  # files in one message


@dataclass(frozen=True)
class Votes:
    """What one rater answered.

    Attributes:
        rater: their code.
        answers: by question id, each as it stands in the file.
        is_sealed: whether the study's own server saved them.
    """

    rater: str
    answers: dict[str, dict[str, Any]]
    is_sealed: bool


def check_votes(content: Any, key: Key) -> Votes:
    """Checks what was read from a votes file.

    Raises:
        ValueError: why it can't be counted, the end of a sentence that starts with the file.
    """
    _check_form(content)
    if content["study"] != key.study:
        raise ValueError("is of another study, or of a page that was changed; use the key of its own study")
    text = votes_text(content)
    if not is_same(content["digest"], digest(text)):
        raise ValueError("was changed after it was saved, as its digest does not fit; ask the rater for it again")
    if "seal" in content and not is_same(str(content["seal"]), seal(key.secret, text)):
        raise ValueError("has a seal that is not this study's server's; take the file that the server wrote")
    answers = {answer["question"]: answer for answer in content["answers"]}
    if len(answers) < len(content["answers"]):
        raise ValueError("has two answers to one question; ask the rater for it again")
    for question_id, answer in answers.items():
        question = key.questions.get(question_id)
        if question is None:
            raise ValueError(f"answers {question_id}, which is no question of the study; use the study's own page")
        choices = list(question["choices"])
        if key.mode == "frames":
            choices = in_order(key.seed, content["rater"], question_id, choices)
        if answer["order"] != choices:
            raise ValueError(
                f"shows the answers of {question_id} in an order that is not this rater's; ask the rater for it again"
            )
        if answer["choice"] not in choices:
            raise ValueError(f"has an answer to {question_id} that could not be chosen; ask the rater for it again")
    return Votes(content["rater"], answers, "seal" in content)


def read_votes(paths: Sequence[Path], key: Key) -> list[Votes]:
    """Votes of all raters, sorted by their codes; of files of one rater the one that has all answers of the others,
    a sealed one before a copy without seal.

    Args:
        paths: files, and folders of .json files.
        key: of the study.

    Raises:
        FileNotFoundError: a path is not there, or a folder has no votes.
        ValueError: a file can't be counted, or two files of one rater contradict each other. All bad files are named.
    """
    files = [file for path in paths for file in _files(path)]
    problems: list[str] = []
    found: dict[str, tuple[Path, Votes]] = {}
    for file in files:
        try:
            votes = check_votes(_read_json(file), key)
            other = found.get(votes.rater)
            is_copy = other is not None and votes.answers == other[1].answers and not votes.is_sealed
            if other is None or (_has_all(votes, other[1]) and not is_copy):
                found[votes.rater] = (file, votes)
            elif not _has_all(other[1], votes):
                raise ValueError(
                    f"and {other[0]} are of one rater, {votes.rater}, and each has answers that the other lacks; "
                    "leave one out"
                )
        except ValueError as error:
            problems.append(f"{file} {error}")
    if problems:
        rest = len(problems) - MAX_NAMED
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(f"`votes` must be files as the page saved them: {'; '.join(problems[:MAX_NAMED])}{more}.")
    return [found[rater][1] for rater in sorted(found)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"`votes` must be files that the page saved, but there is nothing at {path}.")
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"`votes` must be files that the page saved, but the folder {path} has no .json.")
    return files


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError("is no JSON, perhaps cut off; ask the rater for it again") from error


def _check_form(content: Any) -> None:
    """Names and types of a votes file."""
    if not isinstance(content, dict) or content.get("format") != VOTES_FORMAT:
        raise ValueError("is no votes file; take what the page's download button saves")
    texts = all(isinstance(content.get(name), str) for name in ("study", "rater", "digest"))
    if not texts or not RATER.fullmatch(content["rater"]) or not isinstance(content.get("answers"), list):
        raise ValueError("lacks study, rater, answers or digest; ask the rater for it again")
    for answer in content["answers"]:
        whole = isinstance(answer, dict) and all(type(answer.get(name)) is kind for name, kind in FIELDS.items())
        if not whole or not all(isinstance(item, str) for item in answer["order"]) or answer["ms"] < 0:
            raise ValueError("has an answer of another form; ask the rater for it again")


def _has_all(votes: Votes, others: Votes) -> bool:
    """Whether these votes answer all that the others answer, and none of those questions earlier."""
    return all(
        question in votes.answers and votes.answers[question]["at"] >= answer["at"]
        for question, answer in others.answers.items()
    )
