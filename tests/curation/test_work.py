"""Units are done once, whatever is killed or missing, and joined in one order; the report adds up and stands alone."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.curation import work as module
from lego_pipeline.curation.actions import Action
from lego_pipeline.curation.frames import Outcome
from lego_pipeline.curation.report import write_report
from lego_pipeline.curation.work import Work, cut_units, own_units, summarise
from lego_pipeline.data.manifest import read_manifest

SETTINGS = {"annotations": "a", "size": 256}


def action(number: int, video: str = "v", split: str = "train") -> Action:
    return Action(id=f"{video}-{number}", video=video, action="open <drawer>", source="s", licence="l", split=split)


def outcome(of: Action, reason: str | None = None) -> Outcome:
    picture = PIL.Image.fromarray(np.random.default_rng(len(of.id)).integers(0, 255, (16, 24, 3), np.uint8))
    if reason is not None:
        return Outcome(action=of, reason=reason, detail="measured 1", pictures=(picture,))
    facts: dict[str, Any] = {"time_0": 0.5, "time_1": 1.5, "similarity": 0.9, "boxes_0": None, "boxes_1": []}
    facts |= {"video": of.video, "pts_0": 15, "pts_1": 45, "time_base": "1/30"}
    row = {"id": of.id, "image_0": picture, "image_1": picture, "action": of.action, "split": of.split, **facts}
    return Outcome(action=of, reason=None, row=row, pictures=(picture, picture))


def do_all(work: Work, units: Sequence[Sequence[Action]], reasons: dict[str, str], order: Sequence[int]) -> None:
    for number in order:
        work.write_unit(number, units[number], {}, [outcome(one, reasons.get(one.id)) for one in units[number]])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_units_hold_one_video_each_and_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT", 2)
    units = cut_units([action(i, video) for video in "ab" for i in range(3)])
    assert [[one.id for one in unit] for unit in units] == [["a-0", "a-1"], ["a-2"], ["b-0", "b-1"], ["b-2"]]


def test_the_units_of_a_video_belong_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT", 1)
    units = cut_units([action(i, video) for video in "abc" for i in range(2)])
    assert [own_units(units, rank, 2) for rank in range(2)] == [[0, 1, 4, 5], [2, 3]]


def test_pairs_of_the_units_before_are_those_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT", 1)
    units = cut_units([action(i, video) for video in "ab" for i in range(3)])
    work = Work(tmp_path, SETTINGS)
    work.claim()
    do_all(work, units, {"b-1": "no hands"}, range(6))
    (row,) = work.earlier(5, units)
    assert (row["video"], row["action"], row["pts_1"], row["time_base"]) == ("b", "open <drawer>", 45, "1/30")
    expected = outcome(units[3][0]).pictures[0]
    assert np.array_equal(np.asarray(row["image_0"]), np.asarray(expected))
    assert work.earlier(3, units) == []


def test_the_result_has_the_same_bytes_whatever_order_units_are_done_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 3)
    units = [[action(i, video, "val" if video == "c" else "train") for i in range(3)] for video in "abcde"]
    reasons = {"a-0": "no hands", "d-0": "missing video", "d-1": "missing video", "d-2": "missing video"}
    for name, order in (("one", range(5)), ("two", (4, 2, 0, 3, 1))):
        work = Work(tmp_path / name, SETTINGS)
        work.claim()
        do_all(work, units, reasons, order)
        work.finish(len(units))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    shards = [f"manifest/train/{i:06d}.parquet" for i in range(3)] + ["manifest/val/000000.parquet"]
    assert list(one) == [*shards, "outcomes.jsonl", "report.html", "summary.json"]
    rows = read_manifest(tmp_path / "one" / "manifest", "train")
    assert rows["id"][:] == ["a-1", "a-2", "b-0", "b-1", "b-2", "e-0", "e-1", "e-2"]
    assert rows[0]["image_0"].size == (24, 16)


def test_a_unit_is_done_again_if_it_broke_off_or_its_video_changed(tmp_path: Path) -> None:
    unit, video = [action(0)], tmp_path / "v.mp4"
    work = Work(tmp_path / "out", SETTINGS)
    work.claim()
    assert not work.is_done(0, unit, {})
    work.write_unit(0, unit, {}, [outcome(unit[0], "missing video")])
    assert work.is_done(0, unit, {})
    video.write_bytes(b"1")
    assert not work.is_done(0, unit, {"v": video})  # it was missing
    work.write_unit(0, unit, {"v": video}, [outcome(unit[0])])
    assert work.is_done(0, unit, {"v": video})
    video.write_bytes(b"12")
    assert not work.is_done(0, unit, {"v": video})
    assert not work.is_done(0, [action(1)], {"v": video})
    (tmp_path / "out/work/000000.json").unlink()  # which is written after the rows
    assert not work.is_done(0, unit, {"v": video})
    work.write_unit(0, unit, {"v": video}, [outcome(unit[0], "no hands")])
    assert not (tmp_path / "out/work/000000.parquet").exists()


def test_a_folder_of_other_settings_is_refused_before_and_after_it_is_finished(tmp_path: Path) -> None:
    work = Work(tmp_path, SETTINGS)
    work.claim()
    other = {**SETTINGS, "size": 128}
    message = r"`output_dir` .* holds a curation with other size; name another folder"
    with pytest.raises(ValueError, match=message):
        Work(tmp_path, other).claim()
    do_all(work, [[action(0)]], {}, [0])
    work.finish(1)
    with pytest.raises(ValueError, match=message):
        Work(tmp_path, other).claim()
    again = Work(tmp_path, SETTINGS)
    again.claim()
    assert again.summary is not None and again.summary["pairs"] == 1


def test_killed_while_joining_it_is_joined_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [[action(i, video)] for i, video in enumerate("ab")]

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    work = Work(tmp_path / "a", SETTINGS)
    work.claim()
    do_all(work, units, {}, [0, 1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_report", killed)
        work.finish(2)
    again = Work(tmp_path / "a", SETTINGS)
    again.claim()
    assert again.summary is None and all(again.is_done(number, unit, {}) for number, unit in enumerate(units))
    assert again.finish(2)["pairs"] == 2
    assert not (tmp_path / "a/work").exists()


def test_joined_anew_with_fewer_pairs_no_shard_of_before_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 1)
    units = [[action(i, video)] for i, video in enumerate("ab")]
    work = Work(tmp_path, SETTINGS)
    work.claim()
    do_all(work, units, {}, [0, 1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_report", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        work.finish(2)
    do_all(work, units, {"b-1": "missing video"}, [1])  # the file has gone since
    work.finish(2)
    assert read_manifest(tmp_path / "manifest", "train")["id"][:] == ["a-0"]


def test_work_that_is_left_behind_a_result_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path, SETTINGS)
    work.claim()
    do_all(work, [[action(0)]], {}, [0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        finished = module.write_text

        def killed(path: Path, text: str) -> None:
            finished(path, text)
            if path.name == module.SUMMARY:
                raise KeyboardInterrupt

        patch.setattr(module, "write_text", killed)
        work.finish(1)
    assert (tmp_path / "work").exists()
    Work(tmp_path, SETTINGS).claim()
    assert not (tmp_path / "work").exists()


def test_parts_that_other_machines_wrote_elsewhere_are_missed(tmp_path: Path) -> None:
    work = Work(tmp_path, SETTINGS)
    work.claim()
    do_all(work, [[action(0)], [action(1, "w")]], {}, [0])
    with pytest.raises(ValueError, match="`output_dir` must be a folder that all processes see, .* has 1 of 2 parts"):
        work.finish(2)


def test_counts_add_up_to_the_input() -> None:
    records = [{"reason": None, "video": "a", "split": "train", "boxes": boxes} for boxes in ([1, 1], [0, 1], [0, 0])]
    records += [{"reason": reason, "video": "b", "split": "val"} for reason in ("no hands", "bad times", "no hands")]
    summary = summarise(records)
    assert summary["actions"] == 6 == summary["pairs"] + sum(summary["dropped"].values())
    assert summary["dropped"] == {"bad times": 1, "no hands": 2}
    assert summary["pairs_with_boxes_in_frames"] == {"both": 1, "one": 1, "none": 1}
    assert (summary["videos"], summary["pairs_by_split"]) == (2, {"train": 3})


def test_the_report_has_examples_of_each_reason_escapes_texts_and_refers_to_nothing(tmp_path: Path) -> None:
    units = [[action(i) for i in range(12)]]
    reasons = {f"v-{i}": "no hands" for i in range(8)} | {"v-8": "black frame"}
    work = Work(tmp_path, SETTINGS)
    work.claim()
    do_all(work, units, reasons, [0])
    work.finish(1)
    html = (tmp_path / "report.html").read_text()
    assert "3 pairs of 12 annotated actions" in html
    assert html.count("<figure>") == 6 + 1 + 3  # at most six of a reason
    assert html.count("data:image/jpeg;base64,") == 6 + 1 + 2 * 3
    assert "open &lt;drawer&gt;" in html and "<drawer>" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    lines = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["no hands"] * 8 + ["black frame"] + [None] * 3


def test_a_report_without_pairs_is_written(tmp_path: Path) -> None:
    summary = summarise([{"reason": "missing video", "video": "a", "split": "train"}]) | {"settings": {}}
    example = {"id": "a", "action": "", "detail": "there is no video a", "pictures": []}
    write_report(tmp_path / "report.html", summary, {"missing video": [example]})
    html = (tmp_path / "report.html").read_text()
    assert "0 pairs of 1 annotated actions" in html and "there is no video a" in html
