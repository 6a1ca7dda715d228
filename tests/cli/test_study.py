"""`lego study` and `lego study-report` as they are typed."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from lego_pipeline.cli import main
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.study import blinding
from lego_pipeline.study.page import Key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_frame: Callable[..., PIL.Image.Image]) -> Path:
    """Folder with a manifest, two systems' pictures, and a study of them."""
    folder = tmp_path_factory.mktemp("made")
    rows: list[dict[str, Any]] = [
        {"id": f"row-{i}", "image_0": make_frame(24, 24, i), "action": f"open box {i}"} for i in range(4)
    ]
    write_shard(rows, folder / "data" / "test.parquet")
    for name in ("one", "two"):
        (folder / name).mkdir()
        for i in range(4):
            make_frame(24, 24, 10 * i + len(name)).save(folder / name / f"row-{i}.png")
    assert main([*command_of(folder), "--output", str(folder / "study")]) == 0
    return folder


def command_of(folder: Path) -> list[str]:
    return ["study", "--data", str(folder / "data"), "--systems", f"one={folder / 'one'}", f"two={folder / 'two'}"]


def write_votes(key: Key, rater: str, path: Path) -> None:
    """Takes the first place everywhere."""
    answers = []
    for name, question in key.questions.items():
        order = blinding.in_order(key.seed, rater, name, list(question["choices"]))
        answers.append({"question": name, "order": order, "choice": order[0], "ms": 900, "at": 5})
    votes = {"format": blinding.VOTES_FORMAT, "study": key.study, "rater": rater, "answers": answers}
    path.write_text(json.dumps({**votes, "digest": blinding.digest(blinding.votes_text(votes))}))


def test_the_result_is_one_object_for_machines(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command_of(made), "--output", str(tmp_path / "study"), "--questions", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["questions"] == 2 and result["url"] is None
    assert Path(result["page"]).is_file() and Key.read(Path(result["key"])).study == result["study"]


def test_votes_become_a_report(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = Key.read(made / "study" / "key.json")
    for rater in ("anna", "ben", "chen"):
        write_votes(key, rater, tmp_path / f"votes-{rater}.json")
    files = [str(path) for path in sorted(tmp_path.glob("votes-*.json"))]
    command = ["study-report", *files, "--key", str(made / "study" / "key.json"), "--output", str(tmp_path / "report")]
    assert main(command) == 0
    assert "| one |" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["questions"]["answers"] == 12
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.md",
        "results.json",
    ]


def test_a_changed_votes_file_is_refused_and_nothing_is_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_votes(Key.read(made / "study" / "key.json"), "anna", tmp_path / "votes.json")
    text = (tmp_path / "votes.json").read_text()
    (tmp_path / "votes.json").write_text(text.replace('"ms": 900', '"ms": 901', 1))
    command = ["study-report", str(tmp_path / "votes.json"), "--key", str(made / "study" / "key.json")]
    assert main([*command, "--output", str(tmp_path / "report")]) == 2
    assert "was changed after it was saved" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "new"], "`--data` must be given"),
        (["--output", "new", "--serve", "--questions", "3"], "to make a study with `--questions`"),
        (["--output", "new", "--serve"], "there is no file at new/key.json"),
        (["--output", "new", "--data", "data", "--questions", "0"], "`--questions` must be at least 1"),
        (["--output", "new", "--data", "data", "--attention-checks", "-1"], "`--attention-checks` must be at least 0"),
        (["--output", "new", "--data", "data", "--port", "70000"], "`--port` must be from 0"),
        (["--output", "new", "--data", "data", "--systems", "one=one"], "must be at least two"),
        (["--output", "new", "--data", "data", "--systems", "one"], "must be NAME=DIR"),
        (["--output", "new", "--data", "data", "--systems", "one=one", "two=data"], "two lacks 4"),
        (["--output", "new", "--data", "data", "--systems", "one=one", "two=two", "--attention-checks", "1"],
         "`--attention-checks` must be at most the rows of the manifest with `image_1`, 0"),
        (["--output", "new", "--data", "data", "--mode", "descriptions", "--systems", "one=one"], "without a desc"),
        (["--output", "new", "--data", "gone"], "nothing at gone"),
        (["--output", "one/row-0.png", "--data", "data"], "must be a folder"),
    ],
)  # fmt: skip
def test_what_can_not_be_served_is_refused_in_one_line(
    flags: list[str],
    message: str,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    assert main(["study", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (made / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`votes` must be at least one file"),
        (["gone.json"], "nothing at gone.json"),
        (["study/page/study.json"], "is no votes file"),
        (["gone.json", "--attention", "2"], "`--attention` must be from 0 to 1"),
    ],
)
def test_a_report_of_nothing_is_refused(
    flags: list[str],
    message: str,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    assert main(["study-report", *flags, "--key", "study/key.json", "--output", "new"]) == 2
    assert message in capsys.readouterr().err and not (made / "new").exists()


def test_a_study_that_is_there_is_served_until_it_is_interrupted(made: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lego_pipeline.cli",
        "study",
        "--output",
        str(made / "study"),
        "--serve",
        "--json",
    ]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, env=os.environ, text=True)
    try:
        assert process.stdout is not None
        result = json.loads(process.stdout.readline())
        with urllib.request.urlopen(result["url"], timeout=10) as answer:
            assert b"<title>Which picture" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_port_that_is_taken_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lego_pipeline.study.serve import StudyServer

    folder = made / "study"
    with StudyServer(folder, Key.read(folder / "key.json")) as running:
        port = running.server_address[1]
        assert main(["study", "--output", str(folder), "--serve", "--port", str(port)]) == 1
    assert f"`--port` must be free at 127.0.0.1, got {port}" in capsys.readouterr().err
