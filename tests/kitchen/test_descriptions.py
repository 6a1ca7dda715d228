"""Descriptions by slots: right answers, what can be said without looking, and other frames."""

import json

import pytest
import torch
from datasets import Dataset

from examples.kitchen.descriptions import (
    DescriptionsConfig,
    describe_all,
    main,
    markdown,
    other_frames,
    report_of,
    slot_report,
)
from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.data.manifest import read_manifest

DRAWER = "With the {0} hand I grip the handle of the {0} drawer and pull it toward me."
TAP = "With the right hand I lift and turn the tap lever and the water starts to run."
CUP = "With the left hand I grip the {} cup on the left of the counter around its side and lift it up toward me."
TRUTHS = [DRAWER.format("left"), DRAWER.format("left"), DRAWER.format("right"), TAP, CUP.format("red")]
ACTIONS = ["open drawer"] * 3 + ["turn on tap", "take cup"]


def test_other_frames_have_the_same_label_and_are_others():
    actions = ["a", "b", "a", "b", "a", "c"]
    other = other_frames(actions, seed=0)
    assert sorted(other) == list(range(6))
    assert [actions[i] for i in other] == actions
    assert all(other[i] != i for i in range(5)) and other[5] == 5
    assert other == other_frames(actions, seed=0)


def test_true_descriptions_are_right_in_every_slot():
    report = slot_report(TRUTHS, TRUTHS, ACTIONS)
    assert {name: values["share"]["count"] for name, values in report.items()} == {
        "hand": 5,
        "place": 4,
        "colour": 1,
        "open hand": 3,
    }
    assert all(values["share"]["mean"] == 1 for values in report.values())


def test_what_can_be_said_without_looking():
    report = slot_report(TRUTHS, TRUTHS, ACTIONS)
    assert report["hand"]["most_frequent"] == pytest.approx(4 / 5)
    assert report["open hand"]["most_frequent"] == pytest.approx(2 / 3)
    assert report["open hand"]["chance"] == pytest.approx((4 + 1) / 9)


def test_wrong_and_missing_answers_count_against_it():
    written = [DRAWER.format("right"), "", DRAWER.format("right"), TAP, CUP.format("blue")]
    report = slot_report(written, TRUTHS, ACTIONS)
    assert report["open hand"]["share"]["mean"] == pytest.approx(1 / 3)
    assert report["colour"]["share"]["mean"] == 0


def test_a_slot_that_is_never_named_is_left_out():
    assert slot_report([TAP], [TAP], ["turn on tap"])["colour"] is None


def test_false_statements_are_counted_by_kind():
    true = [("left", "left"), ("left", "left"), ("right", "right"), ("right", "middle"), ("left", "left")]
    slots = [json.dumps({"hand": hand, "place": place}) for hand, place in true]
    rows = Dataset.from_dict({"description": TRUTHS, "action": ACTIONS, "slots": slots})
    written = [TRUTHS[0], DRAWER.format("right"), TRUTHS[2], TRUTHS[3], CUP.format("blue")]
    report = report_of(written, TRUTHS, rows)
    assert report["false_statement"]["all"]["mean"] == pytest.approx(2 / 5)
    assert report["false_by_kind"] == {"hand": 0.2, "place": 0.2, "colour": 0.2, "things": 0}
    assert report["equal"]["mean"] == pytest.approx(3 / 5)
    assert "unseen" not in report["slots"]
    assert "| VLM | open hand, all | 67 %" in markdown({"VLM": report})


def test_descriptions_are_kept_and_a_stopped_run_goes_on(tmp_path):
    rows = read_manifest(FRAMES).select(range(5))
    calls = []

    def describe(frames, labels, ids):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(ids)
        return [f"{label} {frame.getpixel((0, 0))}" for frame, label in zip(frames, labels, strict=True)]

    path = tmp_path / "kept" / "tuned.jsonl"
    with pytest.raises(KeyboardInterrupt):
        describe_all(describe, rows, [1, 0, 3, 2, 4], path, batch_size=2)
    calls = [[]]
    written = describe_all(describe, rows, [1, 0, 3, 2, 4], path, batch_size=2)
    assert calls[1:] == [rows["id"][4:5]]
    assert written[0] == f"{rows[0]['action']} {rows[1]['image_0'].getpixel((0, 0))}"


@pytest.mark.slow
def test_the_command_scores_the_embedded_vlm_beside_an_untuned_one(tmp_path, capsys):
    pipeline = LegoPipeline.from_pretrained(KITCHEN)
    torch.nn.init.normal_(pipeline.vlm.lm_head.weight)
    pipeline.vlm.save_pretrained(tmp_path / "start")
    pipeline.vlm_processor.save_pretrained(tmp_path / "start")
    main(DescriptionsConfig(data=FRAMES, output_dir=tmp_path, pairs=20, untuned=tmp_path / "start"))
    vlms = json.loads((tmp_path / "descriptions.json").read_text())["vlms"]
    hands = {name: report["slots"]["all"]["hand"]["share"]["mean"] for name, report in vlms.items()}
    assert hands["tuned"] > 0.7 > hands["untuned"]
    assert hands["tuned"] > vlms["tuned"]["slots_on_other_frames"]["hand"]["share"]["mean"]
    assert (tmp_path / "descriptions.md").read_text() == capsys.readouterr().out
