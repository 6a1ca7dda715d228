"""Votes files: which are counted, which refused and why."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.study import blinding
from lego_pipeline.study.page import Key
from lego_pipeline.study.votes import check_votes, read_votes
from tests.study.conftest import SYSTEMS, picks, votes_of

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def key(frames_study: Path) -> Key:
    return Key.read(frames_study / "key.json")


@pytest.fixture
def votes(key: Key) -> dict[str, Any]:
    return votes_of(key, "anna", picks(SYSTEMS[0]))


def signed(votes: dict[str, Any]) -> dict[str, Any]:
    """With the digest of what they say now: what a rater who reads the code could write."""
    return {**votes, "digest": blinding.digest(blinding.votes_text(votes))}


def test_what_the_page_saves_is_counted(votes: dict[str, Any], key: Key) -> None:
    checked = check_votes(votes, key)
    assert checked.rater == "anna" and len(checked.answers) == 8 and not checked.is_sealed
    seal = blinding.seal(key.secret, blinding.votes_text(votes))
    assert check_votes({**votes, "seal": seal}, key).is_sealed


def swap_choice(votes: dict[str, Any]) -> None:
    answer = votes["answers"][0]
    answer["choice"] = next(choice for choice in answer["order"] if choice != answer["choice"])


@pytest.mark.parametrize(
    "change",
    [
        swap_choice,
        lambda v: v["answers"].pop(),
        lambda v: v["answers"].reverse(),
        lambda v: v.update(rater="ben"),
        lambda v: v["answers"][0].update(ms=1),
        lambda v: v["answers"][0].update(at=1),
        lambda v: v["answers"][0]["order"].reverse(),
        lambda v: v.update(digest="0" * 64),
    ],
)
def test_a_change_of_anything_is_seen(change: Change, votes: dict[str, Any], key: Key) -> None:
    change(votes)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        check_votes(votes, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(study="0" * 64), "is of another study"),
        (lambda v: v.update(rater="ben"), "an order that is not this rater's"),
        (lambda v: v["answers"][0]["order"].reverse(), "an order that is not this rater's"),
        (lambda v: v["answers"][0].update(question="0" * 20), "no question of the study"),
        (lambda v: v["answers"][0].update(choice="0" * 20), "could not be chosen"),
        (lambda v: v["answers"].append(copy.deepcopy(v["answers"][0])), "two answers to one question"),
    ],
)
def test_what_the_page_can_not_have_written_is_refused_with_the_right_digest_too(
    change: Change, message: str, votes: dict[str, Any], key: Key
) -> None:
    change(votes)
    with pytest.raises(ValueError, match=message):
        check_votes(signed(votes), key)


def test_sealed_votes_can_not_be_changed_without_the_secret(votes: dict[str, Any], key: Key) -> None:
    votes["seal"] = blinding.seal(key.secret, blinding.votes_text(votes))
    swap_choice(votes)
    with pytest.raises(ValueError, match="not this study's server's"):
        check_votes(signed(votes), key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="other"), "is no votes file"),
        (lambda v: v.pop("digest"), "lacks study, rater, answers or digest"),
        (lambda v: v.update(rater="../anna"), "lacks study, rater"),
        (lambda v: v.update(answers={}), "lacks study, rater, answers"),
        (lambda v: v["answers"].append(1), "an answer of another form"),
        (lambda v: v["answers"][0].pop("ms"), "an answer of another form"),
        (lambda v: v["answers"][0].update(ms=True), "an answer of another form"),
        (lambda v: v["answers"][0].update(order=[1, 2]), "an answer of another form"),
    ],
)
def test_files_of_another_form_are_refused(change: Change, message: str, votes: dict[str, Any], key: Key) -> None:
    change(votes)
    with pytest.raises(ValueError, match=message):
        check_votes(votes, key)


def test_all_bad_files_are_named_at_once(votes: dict[str, Any], key: Key, tmp_path: Path) -> None:
    good, cut, changed = tmp_path / "good.json", tmp_path / "cut.json", tmp_path / "changed.json"
    good.write_text(json.dumps(votes))
    cut.write_text(json.dumps(votes)[:100])
    changed.write_text(json.dumps({**votes, "rater": "ben"}))
    with pytest.raises(ValueError) as caught:
        read_votes([tmp_path], key)
    assert f"{cut} is no JSON" in str(caught.value) and f"{changed} was changed" in str(caught.value)
    assert str(good) not in str(caught.value)
    assert [v.rater for v in read_votes([good], key)] == ["anna"]


def test_of_two_files_of_a_rater_the_later_one_counts(votes: dict[str, Any], key: Key, tmp_path: Path) -> None:
    early = signed({**votes, "answers": copy.deepcopy(votes["answers"][:3])})
    swap_choice(early)  # a rater may change their mind
    for answer in votes["answers"]:
        answer["at"] += 100
    for name, content in (("1", votes), ("2", signed(early)), ("3", votes)):
        content = signed(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    [found] = read_votes([tmp_path], key)
    assert len(found.answers) == 8 and found.answers[votes["answers"][0]["question"]] == votes["answers"][0]


@pytest.mark.parametrize("names", [("1", "2"), ("2", "1")])
def test_a_downloaded_copy_does_not_take_the_seal_away(
    names: tuple[str, str], votes: dict[str, Any], key: Key, tmp_path: Path
) -> None:
    sealed = {**votes, "seal": blinding.seal(key.secret, blinding.votes_text(votes))}
    for name, content in zip(names, (votes, sealed), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    [found] = read_votes([tmp_path], key)
    assert found.is_sealed


def test_two_people_under_one_code_are_not_mixed(votes: dict[str, Any], key: Key, tmp_path: Path) -> None:
    for name, answers in (("1", votes["answers"][:3]), ("2", votes["answers"][3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(signed({**votes, "answers": answers})))
    with pytest.raises(ValueError, match="of one rater, anna, and each has answers that the other lacks"):
        read_votes([tmp_path], key)


def test_a_path_without_votes_is_named(key: Key, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no .json"):
        read_votes([tmp_path], key)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        read_votes([tmp_path / "gone.json"], key)
