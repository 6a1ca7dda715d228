"""Settings of the training scripts: defaults < file < flags, mistakes end in one line."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lego_pipeline.config import parse_config, to_yaml


@dataclass(kw_only=True)
class ExampleConfig:
    data: Path  # a required one
    cache: Path | None = None
    steps: int = 10
    rate: float = 1e-5
    name: str = "plain"
    sizes: tuple[int, ...] = (1, 2)
    frozen: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")


def parse(*arguments: str) -> ExampleConfig:
    return parse_config(ExampleConfig, arguments=arguments)


def write(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    return str(file)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a mistake in the arguments prints on standard error."""
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_without_file_and_flags() -> None:
    assert parse("--data", "d") == ExampleConfig(data=Path("d"))


def test_the_file_overrules_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "data: d\nsteps: 3\ncache: c\nsizes: [4]\nfrozen: true\n")
    expected = ExampleConfig(data=Path("d"), steps=3, cache=Path("c"), sizes=(4,), frozen=True)
    assert parse("--config", file) == expected


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "data: d\nsteps: 3\nfrozen: true\n")
    config = parse("--steps", "4", f"--config={file}", "--no-frozen")
    assert (config.steps, config.frozen, config.data) == (4, False, Path("d"))


def test_yaml_of_a_config_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = ExampleConfig(data=Path("d"), cache=Path("c"), rate=2e-7, sizes=(3, 4), frozen=True)
    assert parse("--config", write(tmp_path, to_yaml(config))) == config


def test_a_number_that_yaml_takes_for_text_is_read_as_a_number(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path, "data: d\nrate: 1e-3\n")).rate == 1e-3


def test_an_unknown_setting_in_the_file_is_answered_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "--config", write(tmp_path, "data: d\nstep: 3\n"))
    assert "unknown setting `step`; did you mean `steps`?" in error
    assert error.count("\n") == 1


def test_text_for_a_number_in_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`steps` must be int, got 'many'" in refused(capsys, "--config", write(tmp_path, "data: d\nsteps: many\n"))


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refused(capsys, "--data", "d", "--config", str(tmp_path / "nowhere.yaml"))


def test_config_without_a_file_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`--config` must be followed by a file" in refused(capsys, "--data", "d", "--config")


def test_a_file_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must hold `name: value` lines, got list" in refused(capsys, "--config", write(tmp_path, "- 1\n"))


def test_a_missing_required_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data" in refused(capsys, "--steps", "3")


def test_ranges_are_checked_after_all_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`steps` must be at least 1, got 0" in refused(capsys, "--data", "d", "--steps", "0")
    assert parse("--config", write(tmp_path, "data: d\nsteps: 0\n"), "--steps", "2").steps == 2


def test_dry_run_prints_the_settings_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--data", "d", "--dry-run", "--steps", "7")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 7


@pytest.mark.parametrize("arguments", [["--help"]])
def test_help_tells_of_config_file_and_dry_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 0
    assert "--config FILE.yaml" in capsys.readouterr().out
