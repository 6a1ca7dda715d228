"""`lego generate --system` and `--parts`: baselines and the label-only twin by the flags of LEGO."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.baselines import BASELINES
from lego_pipeline.baselines.parts import PARTS
from lego_pipeline.cli import main
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.records import PNG_KEY, write_png, write_records
from lego_pipeline.cli.samples import derive_seed
from lego_pipeline.cli.systems import Parts, System, SystemOptions
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.evaluation import ablation
from lego_pipeline.vlm import llava
from tests.baselines.folders import instruct_pix2pix_folder, text_to_image_folder

ACTIONS = ("open drawer", "take cup", "close tap")
SIZES = ((32, 32), (40, 24), (32, 32))


@pytest.fixture(scope="session")
def data(make_frame: Callable[..., PIL.Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of two aspects."""
    folder, rows = tmp_path_factory.mktemp("manifest"), []
    for i, action in enumerate(ACTIONS):
        file = io.BytesIO()
        make_frame(*SIZES[i], i).save(file, "PNG")
        rows.append({"id": f"r{i}", "image_0": file.getvalue(), "action": action, "description": f"Done in way {i}."})
    write_shard(rows, folder / "a.parquet")
    return folder


@pytest.fixture(scope="session")
def folders(tiny_components: dict[str, Any], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    text_to_image = text_to_image_folder(tiny_components, tmp_path_factory.mktemp("sd") / "text-to-image")
    edit = instruct_pix2pix_folder(tiny_components, tmp_path_factory.mktemp("sd") / "edit")
    return {"instruct-pix2pix": edit, "diffusers": edit, "sdedit": text_to_image, "proxedit": text_to_image,
            "lego": tiny_folder, "label-only": tiny_folder}  # fmt: skip


@pytest.fixture
def generate(data: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `lego generate --data --json --system`: exit code, result, standard error."""

    def run(system: str, output: Path, *argv: object) -> tuple[int, dict[str, Any], str]:
        flags: list[object] = ["generate", "--system", system, "--data", data, "--output", output, "--json"]
        if system in folders:
            flags += ["--model", folders[system], "--steps", 2]
        code = main([*map(str, flags), *map(str, argv)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def record_of(path: Path) -> dict[str, Any]:
    with PIL.Image.open(path) as picture:
        return json.loads(picture.info[PNG_KEY])


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(PIL.Image.open(folder / f"r{i}.png")).astype(int) for i in range(len(ACTIONS))]


def test_names_on_the_command_line_are_those_of_the_systems() -> None:
    assert set(get_args(System)) == {"lego", "label-only", *BASELINES}
    assert get_args(Parts) == PARTS == ablation.PARTS


@pytest.mark.parametrize("system", get_args(System))
def test_every_system_fills_a_manifest_with_lego_s_seeds_and_sizes(
    system: str, tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, result, _ = generate(system, tmp_path / "out", "--batch-size", 3)
    assert code == 0 and result["written"] == 3
    for i, action in enumerate(ACTIONS):
        record = record_of(tmp_path / "out" / f"r{i}.png")
        assert (record["seed"], record["system"], record["action"]) == (derive_seed(0, f"r{i}"), system, action)
        assert (record["description"] == action) == (system != "lego")  # a baseline reads the label
        assert record["steps"] == (None if system == "copy" else 2)
        assert pictures(tmp_path / "out")[i].shape == (*SIZES[i][::-1], 3)
    lines = (tmp_path / "out" / "generation.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["r0", "r1", "r2"]

    monkeypatch.setattr(SystemOptions, "open", lambda *_, **__: pytest.fail("the system was loaded again"))
    assert generate(system, tmp_path / "out")[1]["skipped"] == 3


def test_a_baseline_draws_the_same_in_any_batch_and_goes_on_where_it_stopped(
    tmp_path: Path, generate: Callable
) -> None:
    flags = ("--argument", "strength=0.9")
    generate("sdedit", tmp_path / "one", *flags)
    generate("sdedit", tmp_path / "three", *flags, "--batch-size", 3)
    for first, second in zip(pictures(tmp_path / "one"), pictures(tmp_path / "three"), strict=True):
        assert np.abs(first - second).max() <= 1
    (tmp_path / "three" / "r1.png").unlink()
    code, result, _ = generate("sdedit", tmp_path / "three", *flags)
    assert code == 0 and (result["written"], result["skipped"]) == (1, 2)
    assert np.abs(pictures(tmp_path / "one")[1] - pictures(tmp_path / "three")[1]).max() <= 1
    assert record_of(tmp_path / "one" / "r0.png")["arguments"] == {"resolution": None, "strength": 0.9}
    assert generate("sdedit", tmp_path / "three", "--argument", "strength=0.5")[1]["written"] == 3


def test_one_frame_is_drawn_by_a_baseline_too(
    tmp_path: Path, make_frame: Callable, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_frame(40, 24).save(tmp_path / "frame.png")
    flags = ["--system", "copy", "--image", tmp_path / "frame.png", "--action", "take cup", "--output"]
    assert main(["generate", *map(str, flags), str(tmp_path / "out.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}: take cup\n"
    frame, copied = (np.asarray(PIL.Image.open(tmp_path / name)) for name in ("frame.png", "out.png"))
    assert np.array_equal(frame, copied)


def test_texts_of_a_baseline_are_labels_true_descriptions_or_the_vlms(
    tmp_path: Path, generate: Callable, tiny_folder: Path
) -> None:
    generate("instruct-pix2pix", tmp_path / "label")
    generate("instruct-pix2pix", tmp_path / "manifest", "--descriptions", "manifest")
    written = ("--descriptions", "generate", "--describer", tiny_folder, "--cache", tmp_path / "cache")
    generate("instruct-pix2pix", tmp_path / "vlm", *written, "--batch-size", 2)
    generate("lego", tmp_path / "lego", "--cache", tmp_path / "cache")
    texts = {name: [record_of(tmp_path / name / f"r{i}.png")["description"] for i in range(3)]
             for name in ("label", "manifest", "vlm", "lego")}  # fmt: skip
    assert texts["label"] == list(ACTIONS)
    assert texts["manifest"] == [f"Done in way {i}." for i in range(3)]
    assert texts["vlm"] == texts["lego"]  # one cache serves all systems
    assert any((pictures(tmp_path / "label")[0] != pictures(tmp_path / "vlm")[0]).flatten())


def test_label_only_is_lego_s_part_and_asks_no_vlm(
    tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("generate", "embed"):
        monkeypatch.setattr(llava, name, lambda *_, **__: pytest.fail("the VLM was called"))
    assert generate("label-only", tmp_path / "label")[0] == 0
    assert generate("lego", tmp_path / "parts", "--parts", "label")[0] == 0
    for first, second in zip(pictures(tmp_path / "label"), pictures(tmp_path / "parts"), strict=True):
        assert np.array_equal(first, second)
    assert record_of(tmp_path / "label" / "r0.png")["parts"] == "label"


def test_a_folder_from_before_there_were_systems_is_gone_on_with(
    tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("lego", tmp_path, "--batch-size", 3)
    known = {}
    for i in range(len(ACTIONS)):
        path = tmp_path / f"r{i}.png"
        record = known[record_of(path)["id"]] = record_of(path)
        assert record.pop("system") == "lego"
        assert list(record["request"]) == [
            "model", "dtype", "steps", "guidance_scale", "image_guidance_scale", "descriptions", "parity", "action",
            "description", "seed", "image_sha256",
        ]  # fmt: skip
        with PIL.Image.open(path) as picture:
            write_png(path, picture.copy(), record)
    write_records(tmp_path / "generation.jsonl", known.values())
    monkeypatch.setattr(SystemOptions, "open", lambda *_, **__: pytest.fail("it was drawn again"))
    code, result, _ = generate("lego", tmp_path)
    assert code == 0 and result["skipped"] == 3


def test_all_parts_are_lego_and_fewer_are_another_picture(tmp_path: Path, generate: Callable) -> None:
    generate("lego", tmp_path / "lego", "--batch-size", 3)
    generate("lego", tmp_path / "all", "--parts", "description+image+text", "--batch-size", 3)
    generate("lego", tmp_path / "image", "--parts", "description+image", "--batch-size", 3)
    records = [[record_of(tmp_path / name / f"r{i}.png")["description"] for i in range(3)]
               for name in ("lego", "all", "image")]  # fmt: skip
    assert records[0] == records[1] == records[2]
    lego, whole, image = (pictures(tmp_path / name) for name in ("lego", "all", "image"))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(lego, whole, strict=True))
    assert any(np.abs(a - b).max() > 1 for a, b in zip(lego, image, strict=True))


REFUSED = {
    "no folder": (["sdedit"], "`--model` must be given with `--system sdedit`: a text-to-image folder"),
    "a folder to copy with": (["copy", "--model", "a"], "`--model` must be left out with `--system copy`"),
    "lego's parts": (["sdedit", "--model", "a", "--parts", "description"], "`--parts` must be left out"),
    "few steps": (["sdedit", "--model", "a", "--fast"], "`--fast` must be left out"),
    "an argument of lego": (["lego", "--argument", "strength=1"], "`--argument` must be left out with `--system lego"),
    "parts of a label": (["label-only", "--parts", "description"], "`--parts` must be left out with"),
    "texts of a label": (["label-only", "--descriptions", "manifest"], "`--descriptions` must be left out"),
    "embeddings of a label": (["lego", "--parts", "label", "--cache", "c"], "`--cache` must be left out"),
    "a cache for labels": (["sdedit", "--model", "a", "--cache", "c"], "must go with `--descriptions generate`"),
    "a writer for labels": (["copy", "--describer", "a"], "must go with `--descriptions generate`"),
    "an unknown setting": (["sdedit", "--model", "a", "--argument", "noise=1"], "must be one of num_inference_steps"),
    "no setting": (["sdedit", "--model", "a", "--argument", "strength"], "must be written NAME=VALUE"),
    "no value": (["sdedit", "--model", "a", "--argument", "strength=["], "must have a value as YAML has it"),
    "no plain value": (["diffusers", "--model", "a", "--argument", "a=2026-01-01"], "must be a number or a text"),
    "a bad value": (["sdedit", "--model", "a", "--argument", "strength=2"], "`strength` must be between 0 and 1"),
    "a scale that it lacks": (["sdedit", "--model", "a", "--image-guidance-scale", "2"], "must be left out with"),
    "steps of nothing": (["copy", "--steps", "5"], "`--steps` must be left out with `--system copy`"),
    "a setting twice": (["sdedit", "--model", "a", "--steps", "5", "--argument", "num_inference_steps=4"], "beside"),
    "the paper's": (["copy", "--parity", "paper"], "must be left out with `--parity paper`"),
    "no writer": (
        ["copy", "--descriptions", "generate", "--describer", "./nowhere"],
        "must be the folder of a LegoPipeline, got no folder",
    ),
    "nothing there": (["proxedit", "--model", "./nowhere"], "no readable model_index.json at ./nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_says_why_in_one_line_and_writes_no_file(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generate, "load", lambda self, **_: pytest.fail("a model was loaded"))
    argv, expected = REFUSED[case]
    assert main(["generate", "--data", str(data), "--output", "out", "--system", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err
    assert not Path("out").exists()
