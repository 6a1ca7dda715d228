"""The table: each measure on frames whose answer is known, what is compared with what, and the whole command."""

import json

import numpy as np
import pytest
import torch

from examples.kitchen import table
from examples.kitchen.systems import Scales
from examples.kitchen.table import (
    COPIED,
    JUDGED,
    MEASURED,
    ROUND_TRIP,
    TRUTH,
    WHICH_OF_TWO,
    Pairs,
    TableConfig,
    asked,
    differences,
    intervals,
    main,
    markdown,
    measure,
    other_actions,
    read_pairs,
    tune,
    tuning_score,
)
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation.judge import load_judge


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs(read_manifest(FRAMES).select(range(16)))


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def truth(judge, pairs) -> dict[str, np.ndarray]:
    return measure(judge, pairs, pairs.target)


@pytest.fixture(scope="module")
def copied(judge, pairs) -> dict[str, np.ndarray]:
    return measure(judge, pairs, pairs.before)


def test_every_measure_has_a_value_for_every_pair(truth, pairs):
    assert set(truth) == {*JUDGED, *MEASURED}
    assert all(len(column) == len(pairs.actions) for column in truth.values())
    missing = {name for name, column in truth.items() if np.isnan(column).any()}
    assert missing == {"which"}
    assert np.isnan(truth["which"]).tolist() == [noun not in WHICH_OF_TWO for noun in pairs.nouns]


def test_true_frames_are_equal_to_themselves_and_read_well(truth):
    for region in ("inside", "outside", "whole"):
        assert truth[f"psnr_{region}"].min() > 90
        assert truth[f"ssim_{region}"] == pytest.approx(1, abs=1e-5)
    for name in ("action", "hand_seen", "hand_side"):
        assert truth[name].mean() >= 0.8
    assert truth["overlap_hands"].mean() > 0.4


def test_a_copied_frame_is_far_inside_the_boxes_only(copied):
    assert copied["psnr_inside"].mean() + 4 < copied["psnr_outside"].mean()
    assert copied["ssim_inside"].mean() < copied["ssim_outside"].mean()
    assert copied["action"].mean() <= 0.2


def test_regions_are_told_apart(judge, pairs):
    spoilt = torch.where(pairs.regions["inside"][:, None], -pairs.target, pairs.target)
    values = measure(judge, pairs, spoilt)
    assert values["psnr_outside"].min() > 90
    assert values["psnr_inside"].max() < 20
    # The window of the similarity reaches 5 pixels over the edge.
    assert (values["ssim_outside"] > values["ssim_inside"]).all()


def test_the_parts_of_a_batch_do_not_matter(judge, pairs, copied):
    for name, column in measure(judge, pairs, pairs.before, batch_size=5).items():
        np.testing.assert_allclose(column, copied[name], atol=1e-3)


def test_intervals_leave_out_what_a_pair_does_not_have():
    values = {"which": np.array([1.0, np.nan, 0.0]), "psnr": np.array([np.nan] * 3)}
    result = intervals(values, np.array([True, True, True]))
    assert (result["which"]["mean"], result["which"]["count"]) == (0.5, 2)
    assert result["psnr"] is None


def test_differences_are_of_pairs_that_both_have():
    first = {"psnr": np.array([3.0, 5.0, np.nan, 9.0])}
    second = {"psnr": np.array([2.0, 4.0, 1.0, np.nan])}
    result = differences(first, second, np.array([True] * 4))
    assert (result["psnr"]["mean"], result["psnr"]["count"]) == (1.0, 2)
    assert differences(first, second, np.array([False] * 4)) == {"psnr": None}


class StandIn:
    """A system whose frames are the truth blended with the input, best at guidance 2."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.asked = pairs, []

    def default_scales(self) -> Scales:
        return Scales(1.0, 1.0, 7)

    def frames(self, rows, scales: Scales) -> torch.Tensor:
        self.asked.append(scales)
        return torch.lerp(self.pairs.target, self.pairs.before, abs(scales.guidance_scale - 2) / 2)


def test_the_best_scales_of_the_grid_are_chosen(judge, pairs):
    system = StandIn(pairs)
    config = TableConfig(data=FRAMES, validation_data=FRAMES, guidance_scales=(1.0, 2.0, 3.0))
    scales, tried = tune(system, judge, pairs, config)
    assert scales == Scales(2.0, 1.0, 7)
    assert len(tried) == len(system.asked) == 6
    assert max(tried, key=lambda entry: entry["score"])["guidance_scale"] == 2.0


def test_the_score_trades_ten_points_for_one_db():
    better_judged = {"action": np.array([0.9]), "psnr_inside": np.array([17.0])}
    nearer = {"action": np.array([0.8]), "psnr_inside": np.array([18.0])}
    assert tuning_score(better_judged) == pytest.approx(tuning_score(nearer))


def entry(mean: float, half: float = 0.1) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": 4}


def test_what_is_asked_is_checked_in_the_right_direction():
    rows = {
        TRUTH: {"all": {"action": entry(1.0)}},
        ROUND_TRIP: {"all": {"psnr_outside": entry(30.0)}},
        COPIED: {"all": {"psnr_inside": entry(14.0)}},
        "LEGO": {
            "all": {
                "action": entry(0.85),
                "psnr_inside": entry(17.0),
                "psnr_outside": entry(28.0),
                "hand_side": entry(0.9),
                "which": entry(0.7),
            }
        },
    }
    less_lego = {"psnr_inside": entry(-1.0), "hand_side": entry(-0.05), "which": None}
    result = asked(rows, {"label only": {"all": less_lego}}, "LEGO", "label only")
    assert [item["met"] for item in result.values()] == [True, False, True, True, False, True, False]
    assert list(result.values())[5]["value"] == 1.0


def test_other_actions_are_rendered_once(pairs, tmp_path, monkeypatch):
    few = Pairs(pairs.rows.select(range(5)))
    frames, names = other_actions(few, tmp_path)
    assert any(name is None for name in names) and any(name for name in names)
    for frame, name, action in zip(frames, names, few.actions, strict=True):
        assert name != action
        assert frame.isnan().all().item() is (name is None)
    monkeypatch.setattr("examples.kitchen.other_action.other_row", lambda *_: pytest.fail("rendered again"))
    again, same = other_actions(few, tmp_path)
    assert same == names and torch.equal(again.nan_to_num(), frames.nan_to_num())


def test_the_judge_says_the_other_action(judge, pairs, tmp_path):
    frames, names = other_actions(pairs, tmp_path)
    numbers = [i for i, name in enumerate(names) if name is not None]
    readings = judge.read(pairs.before[numbers], frames[numbers])
    said = [reading.action == names[i] for i, reading in zip(numbers, readings, strict=True)]
    assert sum(said) / len(said) >= 0.75
    assert not any(reading.action == pairs.actions[i] for i, reading in zip(numbers, readings, strict=True))


def test_too_few_pairs_are_said():
    with pytest.raises(ValueError, match="`data` must hold 1000"):
        read_pairs(FRAMES, "test", 1000, "data")


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"systems": ()}, {"guidance_scales": ()}])
def test_settings_that_make_no_table_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        TableConfig(data=FRAMES, validation_data=FRAMES, **settings)


def test_a_name_that_no_system_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`compare_to`"):
        main(TableConfig(data=FRAMES, validation_data=FRAMES, compare_to="nobody"))


@pytest.mark.slow
def test_the_command_writes_its_table_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    rows = read_manifest(FRAMES)
    write_shard([{**row, "split": "val"} for row in rows.select(range(3))], tmp_path / "val" / "val-000000.parquet")
    config = TableConfig(
        data=FRAMES,
        validation_data=tmp_path / "val",
        systems=(f"label only={table.KITCHEN}:label", f"LEGO={table.KITCHEN}"),
        output_dir=tmp_path / "out",
        frames_dir=tmp_path / "frames",
        pairs=6,
        tuning_pairs=3,
        guidance_scales=(1.0, 1.5),
        image_guidance_scales=(1.0,),
        steps=2,
        sheet=2,
        unlucky=1,
    )
    main(config)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(results["rows"]) == [TRUTH, ROUND_TRIP, COPIED, table.OTHER, "label only", "LEGO"]
    assert results["rows"]["LEGO"]["all"]["psnr_inside"]["count"] == 6
    assert results["rows"][TRUTH]["all"]["psnr_whole"]["mean"] > results["rows"][COPIED]["all"]["psnr_whole"]["mean"]
    assert len(results["systems"]["LEGO"]["tried"]) == 2
    assert (tmp_path / "out" / "table.md").read_text() == markdown(results) == printed
    assert (tmp_path / "out" / "contact_sheet.jpg").stat().st_size > 1000
    monkeypatch.setattr(table.Generator, "_generate", lambda *_: pytest.fail("generated again"))
    main(config)
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == results
