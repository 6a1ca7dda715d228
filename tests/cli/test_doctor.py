"""`lego doctor` finds what is missing and says how to get it."""

import json
import shutil
from pathlib import Path

import pytest

import lego_pipeline.checkpoints
from lego_pipeline.cli import doctor, main


@pytest.fixture
def complete(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny pipeline in place of the embedded one."""
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frames.parquet").touch()
    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tiny_folder)
    monkeypatch.setattr(lego_pipeline.checkpoints, "FRAMES", tmp_path / "frames")


@pytest.mark.usefixtures("complete")
def test_a_complete_installation_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and not report["problems"]
    assert set(report["packages"]) >= {"torch", "diffusers", "transformers", "lego-pipeline"}
    assert set(report["checkpoint"]["components"]) >= {"vae", "unet", "projector", "vlm"}
    assert {"train", "eval", "vision", "kitchen", "dev"} <= set(report["extras"])
    assert report["attention"]


@pytest.mark.usefixtures("complete")
def test_a_missing_package_of_an_extra_gives_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else "1")
    assert main(["doctor"]) == 0
    assert 'no peft; pip install "lego-pipeline[train]"' in capsys.readouterr().out


@pytest.mark.usefixtures("complete")
def test_a_missing_core_package_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "datasets" else "1")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        'datasets is not installed: pip install "lego-pipeline"'
    ]


def test_a_missing_checkpoint_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tmp_path)
    monkeypatch.setattr(lego_pipeline.checkpoints, "FRAMES", tmp_path)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count("PROBLEM") == 2 and "make kitchen ARGS=--export" in out


@pytest.mark.usefixtures("complete")
def test_a_missing_component_is_a_problem(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "kitchen" / "model_index.json").write_text((tiny_folder / "model_index.json").read_text())
    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tmp_path / "kitchen")
    assert main(["doctor"]) == 1
    assert "lacks its unet" in capsys.readouterr().out


@pytest.mark.usefixtures("complete")
def test_weights_that_are_cut_off_are_a_problem(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "kitchen")
    [weights] = (tmp_path / "kitchen" / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tmp_path / "kitchen")
    assert main(["doctor", "--json"]) == 1
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert weights.name in problem and "bytes by its header" in problem and "make kitchen ARGS=--export" in problem


@pytest.mark.usefixtures("complete")
def test_a_pair_of_numbers_in_the_config_is_no_component(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({**index, "keep_scene": [0.3, 0.6]}))
    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tmp_path / "model")
    assert main(["doctor", "--json"]) == 0
    assert "keep_scene" not in json.loads(capsys.readouterr().out)["checkpoint"]["components"]
