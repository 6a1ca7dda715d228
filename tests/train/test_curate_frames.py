"""The script: annotations and videos in, a manifest and a report out, the same bytes for any number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.config import parse_config
from lego_pipeline.config import run as run_script
from lego_pipeline.curation import work as work_module
from lego_pipeline.data.manifest import read_manifest
from tests.curation.videos import textured, write_video
from train import curate_frames
from train.curate_frames import CurateFramesConfig

ROOT = Path(__file__).parents[2]
BAND = (-1.0, 1.0)  # these textures have nothing to do with one another


def make_videos(folder: Path, count: int) -> Path:
    """Videos of three seconds with two actions each; the last one is annotated and not there."""
    lines = ["video,start,stop,action"]
    for number in range(count):
        lines += [f"v{number},{start},{start + 1.2},open drawer {number}" for start in (0.5, 1.5)]
        if number < count - 1:
            frames = [textured(100 * number + i) for i in range(90)]
            write_video(folder / "videos" / f"v{number}.mp4", frames)
    (folder / "actions.csv").write_text("\n".join(lines) + "\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("source"), 3)


Run = Callable[..., None]


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    def run(output: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "annotations": (source / "actions.csv",),
            "videos": source / "videos",
            "licence": "own",
        }
        values |= {"output_dir": tmp_path / output, "band": BAND, "val_share": 0.0, **changes}
        curate_frames.main(CurateFramesConfig(**values))

    return run


def test_a_manifest_that_the_other_scripts_read_a_report_and_counts_that_add_up(run: Run, tmp_path: Path) -> None:
    run("out")
    rows = read_manifest(tmp_path / "out" / "manifest", "train")
    assert len(rows) == 4
    assert {(row["licence"], row["source"]) for row in rows} == {("own", "actions")}
    assert rows[0]["video"] == "v0" and rows[0]["action"] == "open drawer 0"
    assert rows[0]["time_0"] == pytest.approx(0.25, abs=0.11) and rows[0]["time_1"] == pytest.approx(1.1, abs=0.11)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["actions"], summary["pairs"], summary["dropped"]) == (6, 4, {"missing video": 2})
    assert summary["settings"]["similarity"] == "colour histograms [-1.0, 1.0]"
    lines = (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines].count("missing video") == 2
    assert "4 pairs of 6 annotated actions" in (tmp_path / "out" / "report.html").read_text()


def test_without_an_encoder_the_log_says_what_stands_in(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run("out")
    assert "no `encoder` is given: pairs are compared by colour histograms" in caplog.text
    assert "dropped: {'missing video': 2}" in caplog.text


def test_killed_in_a_video_it_goes_on_with_the_next_and_ends_alike(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")
    curate, calls = curate_frames.curate, []

    def counted(unit: Any, *arguments: Any) -> Any:
        calls.append(unit[0].video)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return curate(unit, *arguments)

    monkeypatch.setattr(curate_frames, "curate", counted)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    run("killed")
    assert calls == ["v0", "v1", "v1", "v2"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    run("killed")  # complete: nothing is done again
    assert len(calls) == 4


def test_other_settings_or_annotations_need_another_folder(run: Run, source: Path, tmp_path: Path) -> None:
    run("out")
    with pytest.raises(ValueError, match="holds a curation with other size"):
        run("out", size=32)
    other = tmp_path / "other.csv"
    other.write_text((source / "actions.csv").read_text() + "v0,2.0,2.9,close drawer\n")
    with pytest.raises(ValueError, match="holds a curation with other annotations"):
        run("out", annotations=(other,))
    run("out", expect_processes=1)


def test_annotations_and_boxes_are_told_by_what_is_in_them(source: Path, tmp_path: Path) -> None:
    second = tmp_path / "b.csv"
    second.write_text((source / "actions.csv").read_text())
    (tmp_path / "hands").mkdir()
    values: dict[str, Any] = {"videos": source, "output_dir": tmp_path, "boxes": tmp_path / "hands"}

    def settings(*annotations: Path) -> dict[str, Any]:
        return curate_frames.settings_of(CurateFramesConfig(annotations=annotations, **values), "colours")

    first = settings(source / "actions.csv", second)
    assert settings(second, source / "actions.csv") == first
    assert settings(source / "actions.csv")["annotations"] != first["annotations"]
    (tmp_path / "hands" / "v0.json").write_text("{}")
    assert settings(source / "actions.csv", second)["boxes"] != first["boxes"]


def test_long_videos_are_cut_into_units_and_repeats_are_found_across_them(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "actions.csv"
    again = [f"v0,{start},{start + 1.2},open drawer 0" for start in (0.52, 1.53)]
    table.write_text((source / "actions.csv").read_text() + "\n".join(again) + "\n")
    run("one", annotations=(table,))
    monkeypatch.setattr(work_module, "UNIT", 1)
    run("two", annotations=(table,))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one["manifest/train/000000.parquet"] == two["manifest/train/000000.parquet"]
    assert one["outcomes.jsonl"] == two["outcomes.jsonl"]
    assert b"near duplicate" in one["outcomes.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": ()}, "`annotations` must name at least one file"),
        ({"target_position": 1.5}, "`target_position` must be at least 0 and at most 1, got 1.5"),
        ({"window_seconds": -0.1}, "`window_seconds` must be at least 0, got -0.1"),
        ({"videos": Path("none")}, "`videos` must be a folder, found none at none"),
        ({"licence": ""}, "must have a licence; add a column `licence` or give `--licence`"),
        ({"expect_processes": 2}, "`expect_processes` must be the number of processes that run, got 2 and 1"),
    ],
)
def test_mistakes_are_named(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("out", **changes)


def test_the_flags_take_several_files_and_a_band() -> None:
    arguments = ["--annotations", "a.csv", "b.csv", "--videos", "v", "--output-dir", "o", "--format", "epic"]
    config = parse_config(CurateFramesConfig, arguments=[*arguments, "--band", "0.2", "0.9", "--no-require-hands"])
    assert config.annotations == (Path("a.csv"), Path("b.csv"))
    assert (config.format, config.band, config.require_hands) == ("epic", (0.2, 0.9), False)


def test_a_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--annotations", tmp_path / "none.csv", "--videos", tmp_path, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["curate_frames.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(curate_frames.main, CurateFramesConfig)
    assert end.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: `annotations` must be files, found none at")]


def launch(arguments: list[Any], **settings: Any) -> subprocess.Popen[str]:
    """Two processes of the script that know of one another, on the CPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, ROOT / "train" / "curate_frames.py", *arguments]
    return subprocess.Popen([*map(str, command)], env=environment, start_new_session=True, text=True, **settings)


@pytest.mark.slow
def test_two_processes_killed_on_the_way_give_the_bytes_of_one(run: Run, tmp_path: Path) -> None:
    source = make_videos(tmp_path / "source", 30)
    run("one", annotations=(source / "actions.csv",), videos=source / "videos", val_share=0.3)
    arguments = ["--annotations", source / "actions.csv", "--videos", source / "videos", "--licence", "own"]
    arguments += ["--band", *BAND, "--val-share", 0.3, "--output-dir", tmp_path / "two", "--expect-processes", 2]
    first, units = launch(arguments), tmp_path / "two" / "work"
    deadline = time.monotonic() + 300
    while len(list(units.glob("[0-9]*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert 4 <= len(list(units.glob("[0-9]*.json"))) < 30
    second = launch(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output[-4000:]
    expected, found = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(expected) == 5
    assert expected.keys() == found.keys()
    assert {name for name in expected if expected[name] != found[name]} == set()
