"""The render command: the same pairs however they are made, nothing half done, bad pairs only where asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples.kitchen import render as module
from examples.kitchen.render import UNSUITABLE, RenderConfig, main, render, render_rows
from examples.kitchen.scene import SPLITS
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest

ROOT = Path(__file__).parents[2]
SIZE = 32


def frames(row: dict) -> np.ndarray:
    return np.stack([np.asarray(row[name]).astype(int) for name in ("image_0", "image_1")])


def assert_same_pair(made: dict, expected: dict) -> None:
    """Equal up to the rounding that another machine may show."""
    difference = np.abs(frames(made) - frames(expected))
    assert difference.mean() <= 0.1
    assert (difference.max(-1) > 2).mean() <= 0.001
    assert made["description"] == expected["description"]
    pixel = 1 / made["image_0"].width + 1e-6
    for boxes in ("boxes_0", "boxes_1"):
        there = {box["name"]: box for box in expected[boxes]}
        assert {box["name"] for box in made[boxes]} == set(there)
        for box in made[boxes]:
            assert all(abs(box[side] - there[box["name"]][side]) <= pixel for side in ("x0", "y0", "x1", "y1"))


def test_one_and_two_workers_give_the_same_pairs(tmp_path):
    for workers in (1, 2):
        render(RenderConfig(pairs=12, out=tmp_path / str(workers), size=SIZE, workers=workers))
    one, two = (read_manifest(tmp_path / str(workers)) for workers in (1, 2))
    for number in range(12):
        assert_same_pair(one[number], two[number])


def test_the_committed_frames_are_what_the_code_renders():
    committed = read_manifest(FRAMES)
    for number, row in enumerate(render_rows("test", range(3), 128)):
        assert_same_pair(row, committed[number])


def test_the_committed_frames_are_the_first_ones_of_the_test_split():
    assert read_manifest(FRAMES)["id"][:] == [f"kitchen-test-{number:07d}" for number in range(64)]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_a_split_come_from_its_kitchens_and_actions(split):
    settled = SPLITS[split]
    for row in render_rows(split, range(4), 16):
        assert 0 <= int(row["video"].removeprefix("kitchen-")) - settled.first_kitchen < settled.kitchens
        assert row["action"] in settled.actions and row["split"] == split


def test_a_row_has_the_facts_of_the_scene_in_its_slots():
    (row,) = render_rows("test", range(1), 16)
    assert {"hand", "place", "grasp", "motion", "station", "kitchen"} <= set(row["slots"])
    assert row["slots"]["colour"] == "red" and "the red bottle" in row["description"]


def test_running_again_keeps_complete_shards_and_adds_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 2)
    assert render(RenderConfig(pairs=3, out=tmp_path, size=16, workers=1)) == 2
    first = (tmp_path / "train-000000.parquet").stat().st_mtime_ns
    assert render(RenderConfig(pairs=6, out=tmp_path, size=16, workers=1)) == 2  # the half shard and a new one
    assert (tmp_path / "train-000000.parquet").stat().st_mtime_ns == first
    assert read_manifest(tmp_path)["id"][:] == [f"kitchen-train-{number:07d}" for number in range(6)]


def test_a_damaged_shard_is_rendered_again(tmp_path):
    config = RenderConfig(pairs=1, out=tmp_path, size=16, workers=1)
    render(config)
    (tmp_path / "train-000000.parquet").write_bytes(b"PAR1")
    assert render(config) == 1
    assert len(read_manifest(tmp_path)) == 1


def test_a_killed_run_leaves_only_complete_shards_and_no_process(tmp_path):
    code = "import sys; from examples.kitchen import render as r; r.SHARD = 4; sys.exit(r.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--pairs", "400", "--size", "64", "--out", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # returns only when the workers, which share the pipe, have ended
    there = read_manifest(tmp_path)
    assert len(there) % 4 == 0 and there["id"][0] == "kitchen-train-0000000"


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    half = tmp_path / ".train-000000.parquet.123.tmp"
    half.write_bytes(b"PAR1")
    render(RenderConfig(pairs=1, out=tmp_path, size=16, workers=1))
    assert not half.exists()


def test_without_the_switch_no_pair_is_unsuitable():
    assert all("unsuitable" not in row["slots"] for row in render_rows("train", range(6), 16))


def test_unsuitable_pairs_say_why_and_leave_the_others_as_they_are():
    plain, spoilt = render_rows("train", range(12), 16), render_rows("train", range(12), 16, unsuitable=0.5)
    reasons = [row["slots"].get("unsuitable") for row in spoilt]
    assert 3 <= sum(reason is not None for reason in reasons) <= 9
    for before, after, reason in zip(plain, spoilt, reasons, strict=True):
        assert np.array_equal(frames(before), frames(after)) == (reason is None)


def test_each_way_of_being_unsuitable_shows_in_the_frames():
    plain, spoilt = render_rows("train", range(16), SIZE), render_rows("train", range(16), SIZE, unsuitable=1.0)
    seen = set()
    for before, after in zip(plain, spoilt, strict=True):
        reason = after["slots"]["unsuitable"]
        seen.add(reason)
        zero, one = frames(after)
        if reason == "black frame":
            assert min(zero.max(), one.max()) < 8
        elif reason == "blurred frame":
            sharpness = [np.abs(np.diff(f, axis=2)).mean((1, 2, 3)) for f in (frames(before), frames(after))]
            assert (sharpness[1] / sharpness[0]).min() < 0.7
        elif reason == "no hands":
            assert not [box for box in after["boxes_1"] if box["name"].startswith("hand_")]
        else:
            assert np.abs(zero - one).max() <= 1
    assert seen == set(UNSUITABLE)


def refused(capsys, *arguments: str) -> str:
    """Run the command, which must refuse, and return what it says."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    return " ".join((output.out + output.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "0"), "`--pairs` must be 1 to 1000000, got 0"),
        (("--pairs", "1", "--size", "8"), "`--size` must be 16 to 1024 pixels, got 8"),
        (("--pairs", "1", "--workers", "0"), "`--workers` must be at least 1, got 0"),
        (("--pairs", "1", "--unsuitable", "2"), "`--unsuitable` must be a share from 0 to 1, got 2.0"),
        (("--pairs", "1", "--split", "dev"), "'--split'"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, *arguments, "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "must be a folder" in refused(capsys, "--pairs", "1", "--out", str(tmp_path / "file"))


def test_a_folder_with_pairs_of_another_size_is_refused(tmp_path, capsys):
    assert main(["--pairs", "1", "--size", "16", "--workers", "1", "--out", str(tmp_path)]) == 0
    said = refused(capsys, "--pairs", "1", "--size", "32", "--workers", "1", "--out", str(tmp_path))
    assert "holds train pairs with size 16" in said


def test_a_missing_embreex_gives_the_line_that_installs_it(tmp_path):
    code = (
        "import sys; sys.modules['embreex'] = None; from examples.kitchen.render import main; "
        f"sys.exit(main(['--pairs', '1', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "lego-pipeline[kitchen]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_slots_are_json_in_the_shard(tmp_path):
    render(RenderConfig(pairs=1, out=tmp_path, size=16, workers=1))
    assert json.loads(read_manifest(tmp_path)[0]["slots"])["kitchen"] < SPLITS["train"].kitchens
