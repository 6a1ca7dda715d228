"""train/curate_descriptions.py as a user runs it: what it writes, what it asks again, killed and started anew."""

import json
import logging
import os
import random
import shutil
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from filelock import FileLock

from lego_pipeline.config import parse_config, run
from lego_pipeline.curation.descriptions_server import ServerError
from lego_pipeline.data.manifest import read_manifest, write_shard
from tests.curation.chat_server import ChatServer, Reply, completion, failure, sentence
from train.curate_descriptions import CurateDescriptionsConfig, main, warn_of_open_key

KILLS = 8


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to this machine go to no proxy."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 tiny pairs of train, 5 of val; the first has a description, every second one boxes."""
    folder = tmp_path_factory.mktemp("pairs")
    hand = {"name": "hand_right", "x0": 0.25, "y0": 0.5, "x1": 0.75, "y1": 1.0}
    for split, count in (("train", 40), ("val", 5)):
        rows = []
        for number in range(count):
            frame = PIL.Image.new("RGB", (16, 16), (number, 0, 0))
            row = {"id": f"{split}-{number:02d}", "image_0": frame, "image_1": frame, "split": split, "noun": "cup"}
            row |= {"action": f"take cup {split} {number:02d}", "boxes_1": [hand] if number % 2 else None}
            rows.append(row | ({"description": "I take the first cup by hand."} if number == 0 else {}))
        write_shard(rows, folder / split / "0.parquet")
    return folder


def settings(pairs: Path, server: ChatServer, output_dir: Path, **changes: Any) -> CurateDescriptionsConfig:
    values = {"data": pairs, "base_url": server.url, "model": "m", "output_dir": output_dir, "concurrency": 4}
    return CurateDescriptionsConfig(**{**values, "timeout_seconds": 5.0, "retries": 2, **changes})


def written(folder: Path) -> dict[str, str]:
    rows = read_manifest(folder / "manifest")
    assert len(set(rows["id"][:])) == len(rows)
    return dict(zip(rows["id"][:], rows["description"][:], strict=True))


def counts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_rows_become_descriptions_and_the_counts_add_up(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    caplog.set_level(logging.DEBUG)

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        number = int(action.split()[-1])
        return completion("No." if number in (3, 4) else "No." if number == 5 and not before else sentence(action))

    options = {"api_key_env": "SOME_KEY", "price_input": 2.0, "price_output": 10.0, "split": ("train", "val")}
    with ChatServer(script) as server:
        main(settings(pairs, server, tmp_path, **options))
        asked = len(server.bodies)
        main(settings(pairs, server, tmp_path, **options))
        assert len(server.bodies) == asked  # a second run asks for nothing
        main(settings(pairs, server, tmp_path, **options, retry_quarantined=True))
        assert len(server.bodies) == asked + 8
    found = written(tmp_path)
    assert found["train-00"] == "I take the first cup by hand."
    assert found["train-39"] == sentence("take cup train 39")
    assert len(found) == 45 - 4
    report = counts(tmp_path)
    assert {name: report[name] for name in ("rows", "kept", "described", "quarantined", "unanswered")} == {
        "rows": 45, "kept": 2, "described": 39, "quarantined": 4, "unanswered": 0
    }  # fmt: skip
    assert report["quarantined_by_reason"] == {"is too short": 4}
    assert report["asked_without_boxes"] == 21 and report["asked_twice"] == 5
    assert (report["prompt_tokens"], report["completion_tokens"]) == (
        100 * len(server.bodies),
        20 * len(server.bodies),
    )
    assert report["price"] == pytest.approx(len(server.bodies) * (100 * 2 + 20 * 10) / 1e6)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["train-03", "train-04", "val-03", "val-04"]
    assert all(line["answers"] == ["No.", "No."] and "too short" in line["reason"] for line in lines)
    assert len(json.loads((tmp_path / "llava" / "val.json").read_text())) == sum(
        name.startswith("val") for name in found
    )
    assert "Bearer sk-secret" in server.keys
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in path.read_bytes() for path in files)
    assert "sk-secret" not in caplog.text


def test_what_has_no_answer_is_asked_for_by_the_next_run(pairs: Path, tmp_path: Path) -> None:
    is_down = True

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        return failure(503) if is_down and action.endswith("7") else completion(sentence(action))

    with ChatServer(script) as server:
        with pytest.raises(OSError, match="4 rows have no answer yet"):
            main(settings(pairs, server, tmp_path))
        assert len(written(tmp_path)) == 36 and counts(tmp_path)["unanswered"] == 4
        is_down = False
        asked = len(server.bodies)
        main(settings(pairs, server, tmp_path))
        assert len(server.bodies) == asked + 4
    assert len(written(tmp_path)) == 40


def test_a_run_that_ends_early_keeps_what_it_got(pairs: Path, tmp_path: Path) -> None:
    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        return failure(401) if int(action.split()[-1]) >= 20 else completion(sentence(action))

    with ChatServer(script) as server:
        with pytest.raises(ServerError, match="API key"):
            main(settings(pairs, server, tmp_path, concurrency=1))
        server.script = lambda action, before, body: completion(sentence(action))
        main(settings(pairs, server, tmp_path))
    asked = Counter(server.actions)
    assert [action for action, count in asked.items() if count > 1] == ["take cup train 20"]
    assert len(written(tmp_path)) == 40


def test_another_prompt_or_model_is_asked_anew_and_fewer_rows_are_among_more(pairs: Path, tmp_path: Path) -> None:
    with ChatServer() as server:
        main(settings(pairs, server, tmp_path, rows=10))
        few = written(tmp_path)
        asked = len(server.bodies)
        main(settings(pairs, server, tmp_path, rows=20))
        assert len(server.bodies) - asked in (9, 10)
        assert few.items() <= written(tmp_path).items() and len(written(tmp_path)) == 20
        asked = len(server.bodies)
        main(settings(pairs, server, tmp_path, rows=20, num_examples=2))
        assert len(server.bodies) - asked in (19, 20)


def test_two_runs_at_a_time_are_refused(pairs: Path, tmp_path: Path) -> None:
    with ChatServer() as server, FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="`output_dir` must be used by one run"):
            main(settings(pairs, server, tmp_path))
    assert not server.bodies


def test_rows_that_the_server_refuses_go_into_quarantine_and_hold_up_no_others(pairs: Path, tmp_path: Path) -> None:
    """Twelve refused ones, the first of them ten in a row; the run is stopped, and the next one finishes."""
    refused = {*range(1, 11), 20, 30}
    is_cut_off = True

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        number = int(action.split()[-1])
        if is_cut_off and number == 35:
            return failure(401)
        return failure(400, "too long \ud83d") if number in refused else completion(sentence(action))

    with ChatServer(script) as server:
        with pytest.raises(ServerError, match="no answer to the last 10 rows"):
            main(settings(pairs, server, tmp_path, concurrency=1))
        with pytest.raises(ServerError, match="API key"):
            main(settings(pairs, server, tmp_path, concurrency=1))
        assert not (tmp_path / "report.json").exists()
        is_cut_off = False
        main(settings(pairs, server, tmp_path, concurrency=1))
        asked = len(server.bodies)
        main(settings(pairs, server, tmp_path, concurrency=1))
        assert len(server.bodies) == asked
        main(settings(pairs, server, tmp_path, concurrency=1, retry_quarantined=True))
        assert len(server.bodies) == asked + 12
    assert len(written(tmp_path)) == 28
    report = counts(tmp_path)
    assert (report["described"], report["quarantined"], report["unanswered"]) == (27, 12, 0)
    assert report["quarantined_by_reason"] == {"the server says 400": 12}
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 12


def test_rows_that_never_get_an_answer_keep_no_results_back(pairs: Path, tmp_path: Path) -> None:
    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        return failure(500) if int(action.split()[-1]) <= 12 else completion(sentence(action))

    with ChatServer(script) as server:
        for _ in range(2):
            with pytest.raises(ServerError, match="no answer to the last 10 rows"):
                main(settings(pairs, server, tmp_path, concurrency=1, retries=0))
    assert len(written(tmp_path)) == 28 and counts(tmp_path)["unanswered"] == 12


@pytest.mark.parametrize(
    "data, output_dir",
    [
        ("own/manifest", "own"),
        ("own", "own"),
        ("own/manifest/train", "own"),
        ("own/manifest/train/0.parquet", "own"),
        (".", "described"),
    ],
)
def test_nothing_is_written_over_or_into_the_data(data: str, output_dir: str, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "own" / "manifest")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    with ChatServer() as server:
        config = settings(tmp_path / data, server, tmp_path / output_dir, rows=2)
        with pytest.raises(ValueError, match="`output_dir` must lie apart from `data`"):
            main(config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before and not server.bodies


def test_results_of_something_else_are_left_alone(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "manifest")
    with ChatServer() as server:
        with pytest.raises(ValueError, match="`output_dir` must be new or .* with manifest of something else"):
            main(settings(pairs, server, tmp_path))
        assert not server.bodies and (tmp_path / "manifest" / "train" / "0.parquet").is_file()
        main(settings(tmp_path / "manifest", server, tmp_path / "out", rows=1, split=("val",)))
        main(
            settings(tmp_path / "manifest", server, tmp_path / "out", rows=1, split=("val",))
        )  # its own are no others'


def test_frames_that_changed_reach_the_manifest_though_nothing_is_asked(pairs: Path, tmp_path: Path) -> None:
    with ChatServer() as server:
        for colour in ("teal", "red"):
            frame = PIL.Image.new("RGB", (16, 16), colour)
            row = {"id": "a", "image_0": frame, "image_1": frame, "action": "take cup", "split": "train"}
            write_shard([row], tmp_path / colour / "0.parquet")
            main(settings(tmp_path / colour, server, tmp_path / "out"))
    assert len(server.bodies) == 1
    assert read_manifest(tmp_path / "out/manifest")[0]["image_0"].getpixel((0, 0)) == (255, 0, 0)
    with PIL.Image.open(tmp_path / "out/llava/images/train/a.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content", [sentence("take cup") + " \ud83d", "\ud83d"], ids=["half an emoji", "nothing else"]
)
def test_an_answer_that_no_file_can_hold_stops_no_run(content: str, pairs: Path, tmp_path: Path) -> None:
    with ChatServer(lambda action, *_: completion(content.replace("take cup", action))) as server:
        for _ in range(2):
            main(settings(pairs, server, tmp_path, rows=4))
    report = counts(tmp_path)
    assert report["described"] + report["quarantined"] + report["kept"] == 4


@pytest.mark.parametrize("tail", ["\r", "\n", " \r\n"])
def test_a_key_from_a_file_with_line_ends_is_sent_without_them(
    tail: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", f"sk-secret{tail}")
    with ChatServer() as server:
        main(settings(pairs, server, tmp_path, api_key_env="SOME_KEY", rows=3))
    assert set(server.keys) == {"Bearer sk-secret"}


@pytest.mark.parametrize("key", ["sk-sécret", "sk-secret sk-secret", "sk-secret\rsk-secret"])
def test_a_key_that_cannot_be_sent_is_named_and_written_nowhere(
    key: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with ChatServer() as server, pytest.raises(ValueError, match="`api_key_env` must") as caught:
        main(settings(pairs, server, tmp_path, api_key_env="SOME_KEY"))
    said = "".join([str(caught.value), *capsys.readouterr()])
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not server.bodies and not any("sk-s" in text for text in (said, *files))


@pytest.mark.parametrize(
    "url, key, is_warned",
    [
        ("http://models.example/v1", "sk-secret", True),
        ("http://192.168.1.7:8000/v1", "sk-secret", True),
        ("https://models.example/v1", "sk-secret", False),
        ("http://models.example/v1", None, False),
        ("http://127.0.0.1:8000/v1", "sk-secret", False),
        ("http://[::1]:8000/v1", "sk-secret", False),
        ("http://localhost:8000/v1", "sk-secret", False),
    ],
)
def test_a_key_that_would_travel_openly_is_warned_of(
    url: str, key: str | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_open_key(CurateDescriptionsConfig(data=Path("d"), base_url=url, model="m"), key)
    assert ("without encryption" in caplog.text) == is_warned and "sk-secret" not in caplog.text


def test_dry_run_leaves_out_what_the_journal_has(pairs: Path, tmp_path: Path) -> None:
    with ChatServer() as server:
        main(settings(pairs, server, tmp_path, rows=10))
        asked = len(server.bodies)
        assert settings(pairs, server, tmp_path, rows=10).report() == "every row has a description or an answer"
        report = settings(pairs, server, tmp_path).report()
    assert f"{39 - asked} rows to ask for" in report and f"{asked} rows were asked for before" in report


def test_dry_run_prints_one_whole_prompt_and_the_price(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--data {pairs} --base-url http://127.0.0.1:9/v1 --model m --dry-run --price-input 1 --price-output 4"
    with pytest.raises(SystemExit) as end:
        parse_config(CurateDescriptionsConfig, arguments=line.split())
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert (
        "# You describe how a person" in said and "# Action: take bowl" in said and "(0.25, 0.50, 0.75, 1.00)" in said
    )
    assert "# Action: take cup train 01" in said and "take cup train 02" not in said
    assert "39 rows to ask for, 20 with boxes" in said and "in all" in said


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url"),
        ({"base_url": "https://me:pass@host/v1"}, "base_url"),
        ({"split": ()}, "split"),
        ({"split": ("train", "train")}, "split"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
        ({"min_words": 9, "max_words": 8}, "max_words"),
        ({"question_template": "How?"}, "question_template"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must") as caught:
        CurateDescriptionsConfig(**{"data": Path("d"), "base_url": "http://h/v1", "model": "m", **changes})
    assert "pass@" not in str(caught.value)


def test_a_missing_manifest_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"x --data {tmp_path / 'none'} --base-url http://127.0.0.1:9/v1 --model m --output-dir {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit):
        run(main, CurateDescriptionsConfig)
    assert capsys.readouterr().err.startswith("error: `data` must be a manifest")


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_and_nothing_comes_twice(pairs: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    lock = threading.Lock()

    def script(action: str, before: int, body: dict[str, Any]) -> Reply:
        with lock:
            kind, stall = draw.random(), draw.uniform(0, 0.1)
        if int(action.split()[-1]) == 9:
            return completion("As an AI language model I can't see the cup.")
        if kind < 0.1:
            return failure(draw.choice([429, 500, 503]))
        if kind < 0.15:
            return Reply({}, is_truncated=True)
        if kind < 0.2:
            return completion("Rubbish. Rubbish. Rubbish.")
        reply = completion(sentence(action))
        reply.stall, reply.is_doubled = stall, kind > 0.9
        return reply

    context = get_context("forkserver")
    context.set_forkserver_preload(["train.curate_descriptions", "openai"])
    journal = tmp_path / "out" / "answers.jsonl"
    lengths = []
    with ChatServer(script) as server:
        config = settings(pairs, server, tmp_path / "out", retries=8, concurrency=3)
        for _ in range(KILLS):
            process = context.Process(target=main, args=(config,))
            before = journal.stat().st_size if journal.exists() else 0
            process.start()
            deadline = time.monotonic() + 120
            while process.is_alive() and time.monotonic() < deadline:
                if journal.exists() and journal.stat().st_size > before:
                    break
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.15))
            process.kill()
            process.join()
            lengths.append(journal.stat().st_size)
        process = context.Process(target=main, args=(config,))
        process.start()
        process.join()
    assert process.exitcode == 0
    assert lengths == sorted(lengths) and len(set(lengths)) > 3  # kills came between answers
    outcomes = [json.loads(line) for line in journal.read_text().splitlines()]
    usable = Counter(o["id"] for o in outcomes if o["is_answered"])
    assert len(usable) == 39 and set(usable.values()) == {1}
    found = written(tmp_path / "out")
    bad = {o["id"] for o in outcomes if o["is_answered"] and o["description"] is None}
    assert "train-09" in bad and len(found) == 40 - len(bad)
    for row_id, text in found.items():
        if row_id != "train-00":
            assert text == sentence(f"take cup {row_id.replace('-', ' ')}")
