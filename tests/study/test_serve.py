"""The local server: what it gives, what it takes, what it never gives."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from lego_pipeline.study import blinding
from lego_pipeline.study.page import Key
from lego_pipeline.study.serve import StudyServer
from lego_pipeline.study.votes import check_votes
from tests.study.conftest import SYSTEMS, picks, votes_of


@pytest.fixture
def server(frames_study: Path, tmp_path: Path) -> Iterator[StudyServer]:
    """Serves a copy, so that its votes are its own."""
    folder = copytree(frames_study, tmp_path / "study")
    with StudyServer(folder, Key.read(folder / "key.json")) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(url: str, content: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_page_and_its_frames_are_served_and_nothing_else(server: StudyServer, frames_study: Path) -> None:
    page = frames_study / "page"
    assert ask(server.url) == (200, (page / "index.html").read_bytes())
    for path in ("study.json", f"frames/{next((page / 'frames').iterdir()).name}"):
        assert ask(server.url + path) == (200, (page / path).read_bytes())
    outside = ("key.json", "../key.json", "page/../../key.json", "%2e%2e/key.json", "votes", "votes/", "frames")
    for path in (*outside, "votes/../key", "votes/%2e%2e%2fkey", "frames/../../key.json"):
        status, answer = ask(server.url + path)
        assert status == 404 and server.key.secret.encode() not in answer, path


def test_votes_are_sealed_saved_and_given_back(server: StudyServer) -> None:
    votes = votes_of(server.key, "anna", picks(SYSTEMS[0]))
    assert json.loads(ask(f"{server.url}votes/anna")[1]) == {"saves": True, "votes": None}
    assert ask(f"{server.url}votes", votes)[0] == 200
    saved = json.loads((server.votes / "anna.json").read_text())
    assert check_votes(saved, server.key).is_sealed
    assert {name: saved[name] for name in votes} == votes
    assert json.loads(ask(f"{server.url}votes/anna")[1])["votes"] == saved
    assert json.loads(ask(f"{server.url}votes/ben")[1])["votes"] is None


def test_changed_votes_and_votes_that_lose_answers_are_refused(server: StudyServer) -> None:
    votes = votes_of(server.key, "anna", picks(SYSTEMS[0]))
    status, answer = ask(f"{server.url}votes", {**votes, "rater": "ben"})
    assert status == 409 and b"was changed" in answer and not server.votes.exists()
    assert ask(f"{server.url}votes", votes)[0] == 200
    before = (server.votes / "anna.json").read_bytes()
    fewer = votes_of(server.key, "anna", picks(SYSTEMS[1]))
    fewer = {**fewer, "answers": fewer["answers"][:2]}
    status, answer = ask(f"{server.url}votes", {**fewer, "digest": blinding.digest(blinding.votes_text(fewer))})
    assert status == 409 and b"lack 6 answers" in answer
    assert (server.votes / "anna.json").read_bytes() == before
    changed = votes_of(server.key, "anna", picks(SYSTEMS[1]))  # a change of mind
    for answer in changed["answers"]:
        answer["at"] += 1
    changed["digest"] = blinding.digest(blinding.votes_text(changed))
    assert ask(f"{server.url}votes", changed)[0] == 200
    assert ask(f"{server.url}votes", votes)[0] == 409  # of a window that doesn't know of it, or late on its way
    assert json.loads((server.votes / "anna.json").read_text())["answers"] == changed["answers"]


def test_a_seal_that_was_sent_is_not_believed(server: StudyServer) -> None:
    votes = votes_of(server.key, "anna", picks(SYSTEMS[0]))
    assert ask(f"{server.url}votes", {**votes, "seal": "forged"})[0] == 200
    assert check_votes(json.loads((server.votes / "anna.json").read_text()), server.key).is_sealed


def test_a_browser_that_leaves_is_no_error(server: StudyServer, capfd: pytest.CaptureFixture[str]) -> None:
    for error in (BrokenPipeError(), ConnectionResetError()):
        try:
            raise error
        except ConnectionError:
            server.handle_error(None, ("127.0.0.1", 1))
    assert capfd.readouterr().err == ""
    try:
        raise KeyError("mistake")
    except KeyError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.parametrize("content", [[], "text", {}, {"format": "lego-votes/1"}])
def test_what_is_no_votes_is_refused(content: Any, server: StudyServer) -> None:
    assert ask(f"{server.url}votes", content)[0] == 409
    assert ask(server.url)[0] == 200


def test_another_sites_page_can_not_send_votes(server: StudyServer) -> None:
    votes = votes_of(server.key, "anna", picks(SYSTEMS[0]))
    assert ask(f"{server.url}votes", votes, kind="text/plain")[0] == 400
    assert ask(f"{server.url}elsewhere", votes)[0] == 400
    assert not server.votes.exists()


@pytest.mark.parametrize("name", ["study.json", "frames"])
def test_a_study_that_was_changed_is_not_served(name: str, frames_study: Path, tmp_path: Path) -> None:
    folder = copytree(frames_study, tmp_path / "study")
    path = folder / "page" / name
    path = path if path.is_file() else sorted(path.iterdir())[0]
    path.write_bytes(path.read_bytes().replace(b"e", b"f", 1))
    with pytest.raises(ValueError, match=f"{path.name} was changed or is missing"):
        StudyServer(folder, Key.read(folder / "key.json"))
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} was changed or is missing"):
        StudyServer(folder, Key.read(folder / "key.json"))
