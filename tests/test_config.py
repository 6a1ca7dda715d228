"""Settings of the training scripts: defaults < file < flags, mistakes end in one line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from torch.utils.data import DataLoader, Dataset

from lego_pipeline.config import parse_config, run, section_of, to_yaml
from lego_pipeline.training import SaveError


@dataclass(kw_only=True)
class ExampleConfig:
    data: Path  # a required one
    cache: Path | None = None
    steps: int = 10
    rate: float = 1e-5
    name: str = "plain"
    sizes: tuple[int, ...] = (1, 2)
    frozen: bool = False
    folders: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()
    tuning: Literal["full", "lora"] = "full"

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
    lists = {"sizes": (3, 4), "folders": (Path("e"), Path("f")), "weights": (0.5, 2e-7)}
    config = ExampleConfig(data=Path("d"), cache=Path("c"), rate=2e-7, frozen=True, tuning="lora", **lists)
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


def test_lists_are_given_in_the_file_and_by_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "data: d\nfolders: [a, b]\nweights: [1, 1e-3]\n")
    config = parse("--config", file)
    assert (config.folders, config.weights) == ((Path("a"), Path("b")), (1.0, 1e-3))
    config = parse("--config", file, "--folders", "c", "d", "e", "--weights", "2", "--data", "f")
    assert (config.folders, config.weights, config.data) == ((Path("c"), Path("d"), Path("e")), (2.0,), Path("f"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("weights: [1, much]", "`weights` must be a list of float, got [1, 'much']"),
        ("folders: a", "`folders` must be a list of Path, got 'a'"),
        ("tuning: half", "`tuning` must be 'full' or 'lora', got 'half'"),
        ("cache: 3", "`cache` must be Path or null, got 3"),
        ("frozen: 1", "`frozen` must be bool, got 1"),
        ("steps: true", "`steps` must be int, got True"),
        ("rate: false", "`rate` must be float, got False"),
        ("a: [", "must be YAML: while parsing"),
    ],
)
def test_a_value_of_another_type_in_the_file_is_refused(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "--config", write(tmp_path, f"data: d\n{line}\n"))
    assert expected in error
    assert error.count("\n") == 1


# Files with a section for each script


def test_a_section_is_named_after_the_scripts_dataclass() -> None:
    assert section_of(ExampleConfig) == "example"
    assert section_of(type("TrainLdmConfig", (), {})) == "train_ldm"
    assert section_of(type("CacheEmbeddingsConfig", (), {})) == "cache_embeddings"


def test_a_script_reads_its_own_section_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "example:\n  data: d\n  steps: 3\ntrain_ldm:\n  unknown_here: 1\ntune_vlm:\n")
    assert parse("--config", file, "--rate", "1") == ExampleConfig(data=Path("d"), steps=3, rate=1.0)


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    assert parse("--data", "d", "--config", write(tmp_path, "example:\ntrain_ldm:\n  a: 1\n")).steps == 10


def test_an_unknown_setting_in_the_own_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "example:\n  data: d\n  step: 3\ntrain_ldm:\n  steps: 1\n")
    assert "unknown setting `step`; did you mean `steps`?" in refused(capsys, "--config", file)


def test_a_file_without_the_scripts_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "exampel:\n  data: d\n")
    expected = "must have a section `example` for this script; did you mean `exampel`?"
    assert expected in refused(capsys, "--config", file)


def test_settings_beside_sections_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "steps: 3\nexample:\n  data: d\n")
    assert "got `steps` beside the section `example`; move it into a section" in refused(capsys, "--config", file)


# Flags and what a script prints


def test_an_unknown_flag_is_answered_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--data", "d", "--stepz", "3")
    assert "--stepz" in error
    assert "--steps" in error


@dataclass(kw_only=True)
class ReportingConfig:
    size: int = 3

    def report(self) -> str:
        if self.size > 9:
            raise ValueError(f"`size` must be at most 9, got {self.size}.")
        return f"memory: {2 * self.size} GB\n\nof 24 GB"


def test_a_dry_run_prints_the_scripts_report_as_comments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(ReportingConfig, arguments=["--size", "4", "--dry-run"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output == "size: 4\n# memory: 8 GB\n#\n# of 24 GB\n"
    assert parse_config(ReportingConfig, arguments=["--size", "10"]).size == 10
    with pytest.raises(SystemExit) as stop:
        parse_config(ReportingConfig, arguments=["--size", "10", "--dry-run"])
    assert stop.value.code == 2


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError, SaveError])
def test_a_mistake_ends_a_script_with_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: ReportingConfig) -> None:
        raise error(f"`size` must be\neven, got {config.size}.")

    monkeypatch.setattr(sys, "argv", ["script", "--size", "5"])
    with pytest.raises(SystemExit) as stop:
        run(main, ReportingConfig)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: `size` must be even, got 5.\n"


class Items(Dataset):
    """A data set whose items can't be had."""

    def __getitem__(self, index: int) -> int:
        try:
            raise KeyError(index)
        except KeyError as error:
            raise ValueError(f"`row` must be\nwhole, got: {index}.") from error


def test_an_error_of_a_loaders_worker_ends_a_script_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: ReportingConfig) -> None:
        next(iter(DataLoader(Items(), batch_sampler=[[config.size]], num_workers=1)))

    monkeypatch.setattr(sys, "argv", ["script", "--size", "5"])
    with pytest.raises(SystemExit):
        run(main, ReportingConfig)
    assert capsys.readouterr().err == "error: `row` must be whole, got: 5.\n"


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_report_that_fails_ends_a_dry_run_with_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(_: ReportingConfig) -> str:
        raise error("adapters need\npeft.")

    monkeypatch.setattr(ReportingConfig, "report", report)
    with pytest.raises(SystemExit) as stop:
        parse_config(ReportingConfig, arguments=["--dry-run"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: adapters need peft.\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(ZeroDivisionError):
        run(lambda config: print(1 / (config.size - 3)), ReportingConfig)


def test_a_script_runs_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "argv", ["script", "--size", "5"])
    run(seen.append, ReportingConfig)
    assert seen == [ReportingConfig(size=5)]


def test_help_tells_of_config_file_and_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "--config FILE.yaml" in capsys.readouterr().out
