"""The real hand detector: what is done around its two models, its columns in the table, and the models themselves."""

import json
import math

import numpy as np
import pytest
import torch

from examples.kitchen import hand_calibration, hand_detector, table
from examples.kitchen.frames import load_frames, to_unit
from examples.kitchen.hand_calibration import (
    CALIBRATION,
    HandCalibrationConfig,
    calibrate,
    calibration_text,
    side_is_right,
    without_hands,
)
from examples.kitchen.hand_detector import FILES, fetch
from examples.kitchen.render import render_rows
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation import hands
from lego_pipeline.evaluation.hands import (
    DETECTED,
    LANDMARK_SIZE,
    LANDMARKS,
    PALM,
    PALM_SIZE,
    Hand,
    HandDetector,
    Square,
    anchors,
    best_presence,
    cut,
    decode_palms,
    detector_measures,
    hand_square,
    in_same_place,
    load_model,
    suppress,
)

POINTS = torch.tensor([[0, 0], [0, 0.05], [0, -0.05], [0, -0.1], [0, 0], [0, 0], [0, 0], [0, 0]])  # of an upright hand


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder of a manifest with two small rendered pairs of split val."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shard(render_rows("val", range(2), 64), folder / "val-000000.parquet")
    return folder


def test_anchors_are_those_of_the_palm_detector():
    places = anchors() * PALM_SIZE
    assert places.shape == (2016, 2)
    assert places[[0, 1, 2]].tolist() == [[4, 4], [4, 4], [12, 4]]
    assert places[[1151, 1152, 1157, 1158, 2015]].tolist() == [[188, 188], [8, 8], [8, 8], [24, 8], [184, 184]]


def test_a_palm_is_decoded_from_its_anchor():
    values, logits = torch.zeros(2016, 18), torch.full((2016,), -5.0)
    logits[1158] = 2.0
    logits[7] = -0.01
    values[1158] = torch.tensor([12.0, 0.0, 48.0, 96.0, *([0.0, 12.0] * 7)])
    scores, points = decode_palms(values, logits)
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])
    expected = [[12, -40], [60, 56], *([[24, 20]] * 7)]  # the anchor's place is (24, 8)
    torch.testing.assert_close(points[0] * PALM_SIZE, torch.tensor(expected, dtype=torch.float32))


def palm_at(x: float, y: float, side: float) -> torch.Tensor:
    return torch.tensor([[x, y], [x + side, y + side], *([[x, y]] * 7)])


def test_palms_that_overlap_become_their_mean():
    points = torch.stack([palm_at(0.0, 0.0, 0.4), palm_at(0.6, 0.6, 0.2), palm_at(0.1, 0.0, 0.4)])
    scores, merged = suppress(torch.tensor([0.5, 0.7, 1.0]), points)
    assert scores.tolist() == pytest.approx([1.0, 0.7])
    torch.testing.assert_close(merged, torch.stack([palm_at(0.2 / 3, 0.0, 0.4), palm_at(0.6, 0.6, 0.2)]))


def test_no_palm_is_no_error():
    scores, points = suppress(torch.zeros(0), torch.zeros(0, 9, 2))
    assert (scores.shape, points.shape) == ((0,), (0, 9, 2))


@pytest.mark.parametrize(
    ("fingers", "centre", "angle"),
    [((0, -1), (50, 40), 0), ((1, 0), (60, 50), math.pi / 2), ((-1, 0), (40, 50), -math.pi / 2)],
)
def test_the_hands_square_lies_along_the_fingers(fingers, centre, angle):
    palm = torch.tensor([[40.0, 40.0], [60.0, 60.0], *([[50.0, 50.0]] * 7)])
    palm[4] += 5 * torch.tensor(fingers)
    square = hand_square(palm)
    assert (square.x, square.y, square.side) == pytest.approx((*centre, 52))
    assert math.remainder(square.angle - angle, 2 * math.pi) == pytest.approx(0, abs=1e-6)


def test_a_turned_square_has_the_fingers_up():
    frame = torch.zeros(3, 64, 64)
    frame[:, 28:36, 44:60] = 1  # to the right of the middle
    picture = cut(frame, Square(32, 32, 64, math.pi / 2), 64, "zeros")[0].permute(2, 0, 1)
    wanted = torch.zeros(3, 64, 64)
    wanted[:, 4:20, 28:36] = 1
    torch.testing.assert_close(picture, wanted, atol=1e-4, rtol=0)


def test_beyond_the_edges_is_black_or_the_edge():
    frame = torch.ones(3, 16, 32)
    assert cut(frame, Square(16, 8, 32), 32, "zeros")[0, :7].max() == 0
    assert cut(frame, Square(16, 8, 32), 32, "border").min() == 1


def find_white(picture: torch.Tensor) -> list[torch.Tensor]:
    """Instead of the palm detector: a palm of the size of the white patch in the picture, fingers up."""
    values, logits = torch.zeros(1, 2016, 18), torch.full((1, 2016, 1), -9.0)
    y, x = torch.nonzero(picture[0, ..., 0] > 0.5, as_tuple=True)
    if len(x):
        middle = torch.stack([x.float().mean() + 0.5, y.float().mean() + 0.5])
        side = (x.max() - x.min() + 1).float()
        offset = middle - anchors()[1500] * PALM_SIZE
        points = offset + POINTS[1:] * side
        values[0, 1500] = torch.cat([offset, side.repeat(2), points.flatten()])
        logits[0, 1500] = 3.0
    return [values, logits]


def measure_white(picture: torch.Tensor) -> list[torch.Tensor]:
    """Instead of the landmark model: landmarks around the white patch, presence where there is one."""
    y, x = torch.nonzero(picture[0, ..., 0] > 0.5, as_tuple=True)
    corners = torch.tensor([[x.min(), y.min(), 0], [x.max() + 1, y.max() + 1, 0]]).float()
    landmarks = corners.repeat(11, 1)[:21].reshape(1, 63)
    return [landmarks, torch.tensor([[0.9]]), torch.tensor([[0.2]]), torch.zeros(1, 63)]


@pytest.fixture
def stand_in(monkeypatch, tmp_path) -> HandDetector:
    """A detector of white patches."""
    monkeypatch.setattr(hands, "load_model", lambda path: find_white if path.name == PALM else measure_white)
    return HandDetector(tmp_path)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (300, 200)])
def test_hands_are_found_where_they_are_in_the_frame(stand_in, height, width):
    frames = -torch.ones(2, 3, height, width)
    frames[1, :, 60:80, 12:32] = 1  # whole or not at all in each part
    nothing, [hand] = stand_in.read(frames)
    assert nothing == []
    box = torch.tensor(hand.box) * torch.tensor([width, height, width, height])
    torch.testing.assert_close(box, torch.tensor([12.0, 60.0, 32.0, 80.0]), atol=1.0, rtol=0)
    assert hand[0] == pytest.approx(1 / (1 + math.exp(-3)))
    assert hand[2:] == pytest.approx((0.9, 0.2))


def hand(x: float, presence: float = 0.9, right: float = 0.9) -> Hand:
    return Hand(0.8, (x, 0.0, x + 0.2, 0.2), presence, right)


def test_measures_of_frames():
    true = [[hand(0.1)], [hand(0.1)], [hand(0.1, presence=0.4)], [hand(0.1), hand(0.6)]]
    answers = [[hand(0.12)], [hand(0.5), hand(0.1, presence=0.3)], [hand(0.1)], []]
    measures = detector_measures(answers, true)
    assert list(measures) == list(DETECTED)
    assert measures["detector_found"].tolist() == [1, 1, 1, 0]
    assert measures["detector_score"].tolist() == [0.9, 0.9, 0.9, 0]
    np.testing.assert_array_equal(measures["detector_place"], [1, 0, np.nan, 0])
    assert in_same_place([hand(0.6)], true[3]) == 1
    assert best_presence([]) == 0


def test_sides_are_compared_where_the_hand_is_known():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.4, 0.0, 1.0, 0.5]])
    right_in_left, left_in_left, in_both = hand(0.1), hand(0.1, right=0.1), hand(0.35)
    assert side_is_right([right_in_left, left_in_left, in_both, hand(0.7), hand(0.7, presence=0.2)], boxes) == [
        0,
        1,
        1,
    ]


def test_missing_and_broken_models_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python -m examples.kitchen.hand_detector --output-dir"):
        load_model(tmp_path / PALM)
    (tmp_path / PALM).write_bytes(b"no model at all")
    with pytest.raises(ValueError, match=f"{PALM} must be a LiteRT model"):
        load_model(tmp_path / PALM)


def test_a_wheel_that_cannot_be_had_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"pip must be able to download mediapipe==0.10.21, it said: .*No matching"):
        fetch(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_models_that_are_there_are_not_fetched(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_bytes(b"there")
    monkeypatch.setattr(hand_detector.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    fetch(tmp_path)


def test_target_frames_are_rendered_without_hands_once(pairs, tmp_path, monkeypatch):
    rows = read_manifest(pairs, "val")
    frames = without_hands(rows, "val", tmp_path)
    changed = (frames - to_unit(load_frames(rows))[:, 1]).abs().amax(1) > 0.3
    for picture, boxes in zip(changed, rows["boxes_1"][:], strict=True):
        for box in boxes:
            if box["name"].startswith("hand"):
                y0, y1, x0, x1 = (round(64 * box[key]) for key in ("y0", "y1", "x0", "x1"))
                assert picture[y0:y1, x0:x1].float().mean() > 0.1
                picture[y0:y1, x0:x1] = False
        assert picture.float().mean() < 0.02
    monkeypatch.setattr("examples.kitchen.raytrace.trace", lambda *_: pytest.fail("rendered again"))
    assert torch.equal(without_hands(rows, "val", tmp_path), frames)


class Oracle:
    """Finds hands, each time the same one, unless it is asked about frames without hands."""

    def read(self, images: torch.Tensor, name: str) -> list[list[Hand]]:
        return [[] if name == "no hands" else [hand(0.4)] for _ in images]


def test_the_calibration_tells_the_three_kinds_apart(pairs, tmp_path, capsys, monkeypatch):
    rows = read_manifest(pairs, "val")
    found = calibrate(Oracle(), rows, "val", tmp_path / "frames")
    assert [found[kind]["found"]["mean"] for kind in ("at rest", "acting", "no hands")] == [1, 1, 0]
    assert found["acting scores higher than no hands"] == 1
    assert "not measured" in calibration_text(tmp_path)
    monkeypatch.setattr(hand_calibration, "HandDetector", lambda _: Oracle())
    hand_calibration.main(HandCalibrationConfig(data=pairs, hand_detector=tmp_path, pairs=2))
    assert "On 2 pairs of split val" in capsys.readouterr().out
    assert "100 % (100 to 100) of the target frames" in calibration_text(tmp_path)
    assert json.loads((tmp_path / CALIBRATION).read_text())["no hands"] == found["no hands"]


def test_pairs_of_others_are_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(hand_calibration, "HandDetector", lambda _: Oracle())
    row = {**read_manifest(pairs, "val")[0], "id": "P01_01_12"}
    write_shard([row], tmp_path / "val-000000.parquet")
    with pytest.raises(ValueError, match="`data` must hold pairs of examples.kitchen.render, got the id 'P01_01_12'"):
        hand_calibration.main(HandCalibrationConfig(data=tmp_path, hand_detector=tmp_path, pairs=1))


def test_the_table_says_when_the_detector_was_not_run():
    entry = {"mean": 0.75, "low": 0.5, "high": 1.0, "count": 4}
    judged = {name: entry for name in (*table.JUDGED, *table.MEASURED)}
    results = {"rows": {table.TRUTH: {"all": judged}}, "compare_to": "LEGO", "paired": {}, "asked": {}}
    text = table.markdown({**results, "hand_detector": None})
    assert "Real hand detector: not run." in text
    assert "found where" not in text
    results["rows"][table.TRUTH]["all"] = {**judged, **{name: entry for name in DETECTED}}
    text = table.markdown({**results, "hand_detector": "It was measured."})
    assert "| true frame | 75 % (50 to 100) | 0.75 (0.50 to 1.00) | 75 % (50 to 100) |" in text
    assert "probability is above 0.5. It was measured." in text


@pytest.mark.slow
def test_the_real_detector_sees_rendered_hands_and_the_table_has_its_columns(tmp_path, capsys):
    models = tmp_path / "models"
    try:
        hand_detector.main(hand_detector.HandDetectorConfig(output_dir=models))
    except OSError as error:
        pytest.skip(f"the wheel with the models can't be had here: {error}")
    palm, landmarks = (load_model(models / name) for name in (PALM, LANDMARKS))
    assert [output.shape for output in palm(torch.zeros(1, PALM_SIZE, PALM_SIZE, 3))] == [(1, 2016, 18), (1, 2016, 1)]
    shapes = [output.shape for output in landmarks(torch.zeros(1, LANDMARK_SIZE, LANDMARK_SIZE, 3))]
    assert shapes == [(1, 63), (1, 1), (1, 1), (1, 63)]

    write_shard(render_rows("val", range(8), 128), tmp_path / "val" / "val-000000.parquet")
    hand_calibration.main(HandCalibrationConfig(data=tmp_path / "val", hand_detector=models, pairs=8))
    shares = json.loads((models / CALIBRATION).read_text())
    assert shares["at rest"]["found"]["mean"] >= 0.6
    assert shares["acting"]["found"]["mean"] > shares["no hands"]["found"]["mean"] + 0.2

    write_shard(render_rows("test", range(4), 128), tmp_path / "test" / "test-000000.parquet")
    config = table.TableConfig(
        data=tmp_path / "test",
        validation_data=tmp_path / "val",
        systems=(f"label only={table.KITCHEN}:label",),
        output_dir=tmp_path / "out",
        frames_dir=tmp_path / "frames",
        hand_detector=models,
        pairs=4,
        tuning_pairs=1,
        guidance_scales=(1.0,),
        image_guidance_scales=(1.0,),
        steps=2,
        sheet=0,
        unlucky=0,
    )
    table.main(config)
    assert "### all, real hand detector" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    found = rows[table.TRUTH]["all"]["detector_place"]
    assert found is None or found["mean"] == 1
    assert rows[table.COPIED]["all"]["detector_found"]["mean"] >= 0.5
    assert all(set(DETECTED) <= set(row["all"]) for row in rows.values())
