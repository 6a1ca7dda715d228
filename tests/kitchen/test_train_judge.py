"""The judge's training: what it is shown, what it is asked, and that it learns and resumes."""

import json

import pytest
import torch
from datasets import Dataset

from examples.kitchen import train_judge
from examples.kitchen.train_judge import JudgePairs, TrainJudgeConfig, augment, build_judge, judge_loss, main
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation.judge import BOXES, NOTHING, Judge, load_judge


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return read_manifest(FRAMES).select(range(12))


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return build_judge()


@pytest.fixture(scope="module")
def pairs(rows, judge) -> JudgePairs:
    return JudgePairs(rows, judge)


def test_answers_are_those_of_the_manifest(pairs, rows, judge):
    _, after, answers = pairs.batch([2, 5], judge)
    for k, row in enumerate(rows.select([2, 5])):
        assert judge.actions[answers["action"][k]] == row["action"]
        assert judge.verbs[answers["verb"][k]] == row["verb"]
        assert judge.nouns[answers["noun"][k]] == row["noun"]
        assert judge.places[answers["place"][k]] == json.loads(row["slots"])["place"]
    assert torch.equal(((after[0] + 1) * 127.5).round().byte(), pairs.frames[2, 1])


def test_a_copied_frame_is_nothing_and_has_the_hands_of_the_frame_before(pairs, judge):
    torch.manual_seed(0)
    before, after, answers = pairs.batch([0, 1, 2], judge, copied=1.0)
    assert torch.equal(before, after)
    assert [judge.actions[i] for i in answers["action"]] == [NOTHING] * 3
    assert (answers["place"] == -100).all()
    assert answers["boxes"][:, BOXES.index("object")].isnan().all()
    torch.testing.assert_close(answers["boxes"][:, :2], pairs.boxes[[0, 1, 2], 0, :2], equal_nan=True)


def test_another_before_comes_from_the_same_station_and_leaves_relative_actions_alone(pairs, rows, judge):
    numbers = list(range(len(rows)))
    torch.manual_seed(1)
    before, after, answers = pairs.batch(numbers, judge, other_before=1.0)
    given, plain, _ = pairs.batch(numbers, judge)
    assert torch.equal(after, plain)
    for i, row in enumerate(rows):
        neighbours = pairs.neighbours[pairs.stations[i]]
        is_other = not torch.equal(before[i], given[i])
        assert not is_other or row["verb"] in train_judge.READ_FROM_AFTER
        assert any(torch.equal(before[i], given[k]) for k in neighbours)
        assert judge.actions[answers["action"][i]] == row["action"]


def test_boxes_move_with_the_frames(monkeypatch):
    monkeypatch.setattr(train_judge, "RELATIVE_SHIFT", 0)
    torch.manual_seed(0)
    after = torch.full((16, 3, 64, 64), -1.0)
    after[:, :, 20:40, 10:30] = 1.0
    box = torch.tensor([10.0, 20.0, 30.0, 40.0]) / 64
    _, moved, boxes = augment(after.clone(), after, box.repeat(16, 3, 1))
    for frame, (x0, y0, x1, y1) in zip(moved, (boxes[:, 0] * 64).round().long().tolist(), strict=True):
        inside = frame[:, y0 + 5 : y1 - 5, x0 + 5 : x1 - 5].mean()
        outside = frame[:, : y0 - 5].mean()
        assert inside - outside > 1
    assert (boxes[:, 0] != box).any()


def test_what_is_not_there_has_no_part_in_the_loss(pairs, judge):
    before, after, answers = pairs.batch([0, 1], judge)
    output = judge.eval()(before, after)
    parts = judge_loss(output, answers)
    assert set(parts) == {"action", "verb", "noun", "place", "guess", "hands", "boxes"}
    assert all(part.isfinite() for part in parts.values())
    perfect = {**output, "boxes": answers["boxes"].nan_to_num()}
    assert judge_loss(perfect, answers)["boxes"].item() == pytest.approx(0, abs=1e-5)


def test_shares_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`copied` and `other_before`"):
        TrainJudgeConfig(data=(tmp_path,), validation_data=tmp_path, copied=0.7, other_before=0.4)


def test_a_guess_from_a_copied_frame_costs(pairs, judge):
    before, after, answers = pairs.batch([0, 1], judge)
    output = judge.eval()(before, after)
    assert judge_loss(output, answers)["guess"].item() == 0
    answers["action"][:] = judge.actions.index(NOTHING)
    even = {**output, "action": torch.zeros_like(output["action"])}
    certain = {**output, "action": 9 * torch.eye(len(judge.actions))[:2]}
    assert judge_loss(certain, answers)["guess"] > judge_loss(even, answers)["guess"] > 0


@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped_and_ends_alike(tmp_path, rows, monkeypatch):
    for split in ("train", "val"):
        write_shard([{**row, "split": split} for row in rows], tmp_path / split / f"{split}-000000.parquet")
    made = {
        "data": (tmp_path / "train",),
        "validation_data": tmp_path / "val",
        "batch_size": 6,
        "max_steps": 4,
        "warmup_steps": 1,
    }
    main(TrainJudgeConfig(**made, output_dir=tmp_path / "whole"))
    main(TrainJudgeConfig(**{**made, "max_minutes": 1e-6}, output_dir=tmp_path / "parts"))
    assert json.loads((tmp_path / "parts" / "report.json").read_text())["finished"] is False
    main(TrainJudgeConfig(**made, output_dir=tmp_path / "parts"))
    whole, parts = (load_judge(tmp_path / name / "judge.safetensors") for name in ("whole", "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])
    report = json.loads((tmp_path / "parts" / "report.json").read_text())
    assert report["finished"] and 0 <= report["action"] <= 1
