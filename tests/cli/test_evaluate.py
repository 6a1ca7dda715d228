"""`lego evaluate` and `lego swap`: folders as `lego generate` writes them, the released tree, every refusal."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.cli import main, records
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation import run
from lego_pipeline.evaluation.metrics.pixels import Psnr

ACTIONS = ("open drawer", "close drawer", "open fridge", "close fridge")
COUNT = 8
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def rows(make_frame: Callable[..., PIL.Image.Image]) -> list[dict[str, Any]]:
    """Pairs of frames of 32 pixels in two videos, with paths as in the release."""
    return [
        {
            "id": f"pair-{i}",
            "image_0": make_frame(32, 32, i),
            "image_1": make_frame(32, 32, 100 + i),
            "action": ACTIONS[i % 4],
            "verb": ACTIONS[i % 4].split()[0],
            "noun": ACTIONS[i % 4].split()[1],
            "split": "val" if i < 6 else "train",
            "video": f"clip {i // 4}",
            "frame_path": f"data/clip{i // 4}/action{i}/frame{i}.jpg",
        }
        for i in range(COUNT)
    ]


@pytest.fixture(scope="session")
def data(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_shard(rows, folder / "pairs.parquet")
    return folder


@pytest.fixture
def system(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """Pictures half way between input and target, with the records of `lego generate`."""
    folder = tmp_path / "ours"
    folder.mkdir()
    made = []
    for row in rows:
        record = {"id": row["id"], "action": row["action"], "description": f"I {row['action']}.", "steps": 4}
        records.write_png(folder / f"{row['id']}.png", PIL.Image.blend(row["image_0"], row["image_1"], 0.5), record)
        made.append(record)
    records.write_records(folder / records.RECORDS, made)
    return folder


@pytest.fixture
def evaluate(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict, str]]:
    """Runs `lego evaluate --json`: exit code, result, standard error."""

    def call(*argv: object, metrics: tuple[str, ...] = ("psnr",), manifest: Path = data) -> tuple[int, dict, str]:
        flags = ["evaluate", "--data", manifest, "--output", tmp_path / "report", "--device", "cpu", "--json"]
        flags += ["--metrics", *metrics] if metrics else []
        code = main([*map(str, flags), *map(str, argv)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return call


def psnr(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
    error = np.square((np.asarray(first, float) - np.asarray(second, float)) / 255).mean()
    return float(-10 * np.log10(error))


def test_all_that_is_asked_for_is_written(
    evaluate: Callable, system: Path, rows: list[dict[str, Any]], tmp_path: Path
):
    code, result, _ = evaluate("--generated", f"ours={system}", "--split", "val")
    assert code == 0 and result["ok"]
    table = result["rows"]
    expected = np.mean([psnr(PIL.Image.open(system / f"{row['id']}.png"), row["image_1"]) for row in rows[:6]])
    assert table["ours"]["scores"]["psnr"]["mean"] == pytest.approx(expected, abs=1e-4)
    floor = np.mean([psnr(row["image_0"], row["image_1"]) for row in rows[:6]])
    assert table["input copied"]["scores"]["psnr"]["mean"] == pytest.approx(floor, abs=1e-4)
    assert table["mean training target"]["kind"] == "floor"  # from the manifest's own train split
    assert table["another true frame, other video"]["count"] == 4
    assert "--pipeline" in result["missing_rows"]["true frame through the VAE"]
    assert table["ours"]["facts"]["steps"] == 4
    folder = tmp_path / "report"
    assert json.loads((folder / "results.json").read_text())["rows"] == table
    assert "| ours |" in (folder / "table.md").read_text()
    assert (folder / "scores.csv").read_text().count("\nours,") == 6
    report = (folder / "report.html").read_text()
    assert "Cases drawn by lot" in report and "I open drawer." in report
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", report)
    assert len(pictures) == 3 * (6 + 3 + 3) and all(
        base64.b64decode(picture)[:2] == b"\xff\xd8" for picture in pictures
    )


def test_systems_are_tested_against_one_another(evaluate: Callable, system: Path, rows: list, tmp_path: Path):
    better = shutil.copytree(system, tmp_path / "better")
    for row in rows:
        PIL.Image.blend(row["image_0"], row["image_1"], 0.9).save(better / f"{row['id']}.png")
    alone = tmp_path / "alone.parquet"
    write_shard([{**row, "video": None} for row in rows], alone)  # two videos are too few to tell anything
    _, result, _ = evaluate("--generated", system, "--generated", f"the better one={better}", manifest=alone)
    first = result["tests"][0]
    assert (first["first"], first["second"]) == ("ours", "the better one")
    assert first["high"] < 0 and first["count"] == COUNT
    assert first["p"] < 0.05 and first["p_holm"] == pytest.approx(7 * first["p"])  # of seven tests
    assert "ours and the better one" in result["reading"][0]


def test_a_second_run_computes_nothing(evaluate: Callable, system: Path, monkeypatch: pytest.MonkeyPatch):
    first = evaluate("--generated", f"ours={system}")[1]

    def refuse(*_):
        raise AssertionError("a score was computed again")

    monkeypatch.setattr(Psnr, "scores", refuse)
    assert evaluate("--generated", f"ours={system}")[1] == first


def test_an_unreadable_picture_is_named_and_what_was_done_is_kept(
    evaluate: Callable, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "CHUNK", 4)
    good = (system / "pair-6.png").read_bytes()
    (system / "pair-6.png").write_bytes(good[:200])
    code, result, error = evaluate("--generated", f"ours={system}")
    assert code == 2 and "pair-6.png" in result["error"] and error.count("\n") == 1
    (system / "pair-6.png").write_bytes(good)
    asked, scores = [], Psnr.scores

    def count(self, generated, target, samples):
        asked.extend(samples)
        return scores(self, generated, target, samples)

    monkeypatch.setattr(Psnr, "scores", count)
    assert evaluate("--generated", f"ours={system}")[0] == 0
    assert "pair-0" not in [sample.id for sample in asked if sample.prompt]


def test_missing_pictures_are_refused_and_with_leave_left_out(evaluate: Callable, system: Path):
    (system / "pair-1.png").unlink()
    (system / "pair-2.png").unlink()
    code, result, error = evaluate("--generated", f"ours={system}")
    assert code == 2 and "2 rows (pair-1, pair-2)" in result["error"] and "--allow-missing" in error
    code, result, _ = evaluate("--generated", f"ours={system}", "--allow-missing")
    entry = result["rows"]["ours"]
    assert code == 0 and entry["count"] == 6 and entry["without_picture"] == ["pair-1", "pair-2"]
    assert entry["note"] == "2 pairs without a picture are left out of its means."


def test_a_metric_without_its_weights_is_named_and_decides_the_exit_code_if_it_was_asked_for(
    evaluate: Callable, system: Path, capsys: pytest.CaptureFixture[str]
):
    code, result, _ = evaluate("--generated", f"ours={system}", metrics=("psnr", "egovlp"))
    assert code == 1 and not result["ok"] and "egovlp.pth" in result["missing_metrics"]["egovlp"]["needs"]
    assert list(result["metrics"]) == ["psnr"]
    code, result, error = evaluate("--generated", f"ours={system}", metrics=("egovlp",))
    assert code == 2 and "egovlp.pth" in result["error"]


def test_all_leaves_out_what_can_not_be_computed_and_the_judge_of_another_world(evaluate: Callable, system: Path):
    code, result, _ = evaluate("--generated", f"ours={system}", metrics=())
    assert code == 0 and {"psnr", "ssim"} <= set(result["metrics"])
    assert {"egovlp", "clip", "fid", "judge"} <= set(result["missing_metrics"])
    assert "rendered kitchen" in result["missing_metrics"]["judge"]["needs"]


def test_the_released_tree_is_read_by_the_frames_paths(evaluate: Callable, rows: list, tmp_path: Path):
    tree = tmp_path / "model-e=0-s=100-si=1.5" / "images"
    for row in rows:
        path = tree / "/".join(row["frame_path"].split("/")[-3:])
        path.parent.mkdir(parents=True)
        row["image_0"].save(path, quality=95)
    for place in (tree, tree.parent):
        code, result, _ = evaluate("--generated", place, "--parity", "paper")
        assert code == 0 and result["parity"] == "paper"
    assert (
        list(result["rows"])[-1] == "model-e=0-s=100-si=1.5" and "infinite" in result["metrics"]["psnr"]["definition"]
    )
    code, result, _ = evaluate("--generated", f"release={tmp_path}")
    assert code == 0 and result["rows"]["release"]["count"] == COUNT
    shutil.copytree(tree.parent, tmp_path / "another run")
    code, result, _ = evaluate("--generated", f"release={tmp_path}")
    assert code == 2 and "another run" in result["error"]


def test_an_exact_copy_is_infinite_in_the_papers_mode_and_breaks_nothing(
    evaluate: Callable, system: Path, data: Path, rows: list, tmp_path: Path
):
    for row in rows[:3]:
        row["image_1"].save(system / f"{row['id']}.png")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for row in rows[1:4]:  # of the first of these, both pictures are exact
        row["image_1" if row is rows[1] else "image_0"].save(drawn / f"{row['id']}--verb.png")
    flags = ("--generated", f"ours={system}", "--swapped", f"ours={drawn}", "--parity", "paper", "--cases", "1")
    code, result, _ = evaluate(*flags)
    score = result["rows"]["ours"]["scores"]["psnr"]
    halves = [psnr(PIL.Image.open(system / f"{row['id']}.png"), row["image_1"]) for row in rows[3:]]
    assert code == 0 and score["count"] == 5 and score["mean"] == pytest.approx(np.mean(halves), abs=1e-4)
    [share] = result["swap"]
    assert (share["mean"], share["count"]) == (pytest.approx((0.5 + 1 + 1) / 3), 3)  # a tie, and two preferred
    report = tmp_path / "report"
    assert re.search(r"\| ours \| [^|]*, 5 pairs \|", (report / "table.md").read_text())
    assert "\nours,pair-0,open drawer,clip 0,inf\n" in (report / "scores.csv").read_text()
    html = (report / "report.html").read_text()
    assert ", 5 pairs</small>" in html and "PSNR inf" in html  # the best case is an exact copy
    assert evaluate(*flags)[1] == result  # from what was kept


def test_a_missing_package_is_named_before_anything_is_computed(
    evaluate: Callable, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, result, _ = evaluate("--generated", f"ours={system}")
    assert code == 2 and 'pip install "lego-pipeline[eval]"' in result["error"]
    assert not (tmp_path / "report").exists()


def test_swapped_actions_go_from_manifest_to_table(
    evaluate: Callable, system: Path, data: Path, rows: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["swap", "--data", str(data), "--output", str(tmp_path / "swapped"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"output": ""} == {
        "ok": True, "rows": COUNT, "verb": COUNT, "noun": COUNT, "output": ""
    }  # fmt: skip
    drawn = tmp_path / "drawn"
    for row in read_manifest(tmp_path / "swapped"):
        records.write_png(drawn / f"{row['id']}.png", row["image_0"], {"id": row["id"], "action": row["action"]})
    assert main(["swap", "--data", str(tmp_path / "swapped"), "--output", str(tmp_path / "swapped")]) == 2
    assert "a folder of its own" in capsys.readouterr().err
    _, result, _ = evaluate("--generated", f"ours={system}", "--swapped", f"ours={drawn}")
    found = {(entry["metric"], entry["part"], entry["how"]): entry for entry in result["swap"]}
    assert set(found) == {("psnr", "verb", "other picture"), ("psnr", "noun", "other picture")}
    assert found["psnr", "verb", "other picture"]["mean"] == 1.0  # half way to the target is nearer than the input
    code, result, _ = evaluate("--generated", f"ours={system}", "--swapped", f"theirs={drawn}")
    assert code == 2 and "`--swapped`" in result["error"]


def test_pictures_that_were_made_for_something_else_are_refused(evaluate: Callable, system: Path):
    known = records.read_records(system / records.RECORDS)
    known["pair-3"] |= {"action": "cut bread"}
    known["pair-4"] |= {"request": {"image_sha256": "0" * 64}}
    records.write_records(system / records.RECORDS, known.values())
    code, result, _ = evaluate("--generated", f"ours={system}")
    assert code == 2 and "2 rows (pair-3, pair-4) from others" in result["error"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "`--generated` must name at least one"),
        (("--generated", "nowhere"), "`--generated` must name a folder"),
        (("--generated", "{system}", "--generated", "ours={system}"), "a name of its own"),
        (("--generated", "input copied={system}"), "a name of its own"),
        (("--generated", "{system}", "--weights", "clip"), "`--weights` must be written NAME=PATH"),
        (("--generated", "{system}", "--weights", "clap=x"), "`weights` must be of"),
        (("--generated", "{system}", "--pairs", "0"), "`--pairs` must be at least 1"),
        (("--generated", "{system}", "--split", "dev"), "`split` must be a split"),
        (("--generated", "{system}", "--pipeline", "nowhere"), "`--pipeline` must be a pipeline folder"),
        (("--generated", "{system}", "--cases-of", "theirs"), "`--cases-of` must be one of ours"),
        (("--generated", "{system}", "--rank-by", "fid"), "`--rank-by` must be one of psnr"),
        (("--generated", "{empty}",), "has none named pair-0.png"),
        (("--generated", "{system}", "--train-data", "nowhere"), "nothing at nowhere"),
        (("--generated", "{system}", "--metrics", "beauty"), "`metrics` must be all or of"),
        (("--generated", "{system}", "--metrics", "all", "psnr"), "`--metrics` must be `all` or names"),
    ],
)  # fmt: skip
def test_a_request_that_can_not_be_served_is_refused_in_one_line(
    evaluate: Callable, system: Path, tmp_path: Path, flags: tuple[str, ...], message: str
):
    (tmp_path / "empty").mkdir()
    code, result, error = evaluate(*(flag.format(system=system, empty=tmp_path / "empty") for flag in flags))
    assert code == 2 and message in result["error"] and error.count("\n") == 1 and error.startswith("lego: ")
    assert not (tmp_path / "report" / "results.json").exists()


def test_a_swap_into_a_folder_of_other_shards_is_refused(data: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["swap", "--data", str(data), "--output", str(data)]) == 2
    assert "`--output` must be a folder of its own" in capsys.readouterr().err
    assert [path.name for path in data.iterdir()] == ["pairs.parquet"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(make_frame: Callable[..., PIL.Image.Image], tmp_path: Path) -> None:
    frames = [make_frame(32, 32, number) for number in range(40)]
    (tmp_path / "ours").mkdir()
    rows = []
    for i in range(500):
        frames[i % 39].save(tmp_path / "ours" / f"pair-{i}.png")
        images = {"image_0": frames[i % 40], "image_1": frames[i % 37]}
        rows.append({"id": f"pair-{i}", **images, "action": ACTIONS[i % 4]})
    write_shard(rows, tmp_path / "pairs.parquet")
    command = [sys.executable, "-m", "lego_pipeline.cli", "evaluate", "--data", "pairs.parquet", "--generated", "ours"]
    command += ["--metrics", "psnr", "--output", "report", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kept = tmp_path / "report" / "cache" / "scores.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not kept.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = kept.read_text()
    assert not (tmp_path / "report" / "results.json").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert kept.read_text().startswith(before.rpartition("\n")[0])
    lines = [json.loads(line)["key"] for line in kept.read_text().splitlines() if line.endswith("}")]
    # Three chunks for the copied input, another true frame and the system; nothing twice.
    assert len(lines) == len(set(lines)) == 9
    assert json.loads((tmp_path / "report" / "results.json").read_text())["rows"]["ours"]["count"] == 500


@pytest.mark.slow
def test_the_report_opens_in_a_browser_without_an_error(
    evaluate: Callable[..., tuple[int, dict, str]], system: Path, browser: Any, tmp_path: Path
) -> None:
    assert evaluate("--generated", f"ours={system}")[0] == 0
    problems, asked = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.goto((tmp_path / "report" / "report.html").as_uri())
    widths = page.evaluate("() => [...document.images].map(image => image.naturalWidth)")
    overflow = page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")
    points = page.locator("svg circle").count()
    page.locator("summary").last.click()
    assert page.get_by_text("ours less input copied").is_visible()
    page.close()
    assert problems == [] and set(asked) <= {"file", "data"} and asked.count("file") == 1
    assert len(widths) == 3 * (8 + 4 + 4) and set(widths) == {32}
    assert overflow <= 0 and points == 4  # copied input, mean target, other video, the system
