"""The `lego` command as a whole: quick help, exit codes, one line for an error."""

import json
import resource
import subprocess
import sys

import pytest

from lego_pipeline.cli import main
from lego_pipeline.cli.doctor import Doctor


def test_help_takes_less_than_a_second_of_cpu_time_and_imports_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "lego_pipeline.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"torch", "diffusers", "transformers", "datasets", "numpy", "PIL"}


@pytest.mark.parametrize("subcommand", ["generate", "enhance", "demo", "doctor"])
def test_help_names_every_subcommand_and_each_has_its_own(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], [subcommand, "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert subcommand in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["paint"], ["demo", "--frame", "eight"], ["generate"]])
def test_flags_that_are_not_understood_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad\n  request"), 2),
        (ImportError("no av"), 2),
        (OSError("disk full"), 1),
        (RuntimeError("out of memory"), 1),
    ],
)
def test_an_error_is_one_line_and_its_kind_decides_the_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Doctor) -> int:
        raise error

    monkeypatch.setattr(Doctor, "run", fail)
    assert main(["doctor", "--json"]) == code
    captured = capsys.readouterr()
    message = " ".join(str(error).split())
    assert captured.err == f"lego: {message}\n"
    assert json.loads(captured.out) == {"ok": False, "error": message}


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Doctor) -> int:
        raise AssertionError

    monkeypatch.setattr(Doctor, "run", fail)
    with pytest.raises(AssertionError):
        main(["doctor"])


def test_an_interruption_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: Doctor) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith("lego: interrupted")
