"""An action becomes the sharpest frames at its two times, or has exactly one reason."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import ImageFilter

from lego_pipeline.curation.actions import Action
from lego_pipeline.curation.frames import REASONS, Outcome, Rules, curate, find_videos, is_hand, reduced
from lego_pipeline.curation.similarity import Similarity
from tests.curation.videos import textured, turn, write_video

ALIKE = Similarity("constant", (0.5, 0.9), lambda first, second: 0.7)
HAND = {"name": "hand_left", "x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}


def action(name: str = "a", **changes: Any) -> Action:
    """An action with its input frame at 0.5 and its target frame at 1.5 s."""
    values = {"id": name, "video": "v", "action": "open drawer", "source": "s", "licence": "l"}
    return Action(**{**values, "time_0": 0.5, "time_1": 1.5, **changes})


def frames() -> list[np.ndarray]:
    """Two seconds at 30 frames a second, every frame another texture."""
    return [textured(i) for i in range(60)]


def blurred(frame: np.ndarray, radius: float = 3) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)))


Run = Callable[..., list[Outcome]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(shown: list[np.ndarray], *actions: Action, similarity: Similarity = ALIKE, **rules: Any) -> list[Outcome]:
        write_video(tmp_path / "v.mp4", shown)
        return list(curate(actions or [action()], find_videos(tmp_path), Rules(**rules), similarity))

    return run


def test_the_sharpest_frames_around_the_times_become_the_pair(run: Run) -> None:
    shown = [frame if i in (14, 46) else blurred(frame, 1) for i, frame in enumerate(frames())]
    (outcome,) = run(shown)
    assert outcome.reason is None and outcome.row is not None
    row = outcome.row
    assert (row["time_0"], row["time_1"]) == (pytest.approx(14 / 30), pytest.approx(46 / 30))
    assert float(row["pts_1"] * Fraction(row["time_base"])) == pytest.approx(46 / 30)
    for name, number in (("image_0", 14), ("image_1", 46)):
        assert np.abs(np.asarray(row[name]).astype(int) - shown[number]).mean() < 8
    assert (row["id"], row["video"], row["source"], row["licence"]) == ("a", "v", "s", "l")
    assert (row["similarity"], row["similarity_by"]) == (0.7, "constant")
    assert row["sharpness_0"] > 0.1


def test_dark_frames_are_no_candidates(run: Run) -> None:
    shown = [frame if i == 15 else frame // 20 for i, frame in enumerate(frames())]
    (outcome,) = run(shown[:30] + frames()[30:])
    assert outcome.row is not None and outcome.row["time_0"] == pytest.approx(0.5)


def change(part: slice, edit: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    shown = frames()
    shown[part] = [edit(frame) for frame in shown[part]]
    return shown


@pytest.mark.parametrize(
    ("shown", "reason", "detail"),
    [
        (change(slice(0, 30), lambda frame: frame // 20), "black frame", "input has a brightness of"),
        (change(slice(30, 60), lambda frame: frame * 0 + 90), "black frame", "target has a brightness of 89"),
        (change(slice(30, 60), blurred), "blurred frame", "target has a sharpness of 0.0"),
        (change(slice(0, 30), lambda frame: textured(0)), "frozen video", "frames around the input differ by 0"),
    ],
    ids=["black", "flat", "blurred", "frozen"],
)
def test_a_bad_frame_has_its_reason(run: Run, shown: list[np.ndarray], reason: str, detail: str) -> None:
    (outcome,) = run(shown, min_sharpness=0.15)  # squares of 8 pixels measure 0.3, and 0.05 when blurred
    assert outcome.reason == reason
    assert detail in outcome.detail
    assert outcome.row is None and outcome.pictures


def test_repeated_frames_of_a_converted_frame_rate_are_not_frozen(run: Run) -> None:
    (outcome,) = run([textured(i // 2) for i in range(60)])
    assert outcome.reason is None


@pytest.mark.parametrize(
    ("value", "reason"), [(0.4, "too different"), (0.95, "too similar"), (0.5, None), (0.9, None)]
)
def test_the_band_of_similarities_is_kept(run: Run, value: float, reason: str | None) -> None:
    (outcome,) = run(frames(), similarity=replace(ALIKE, measure=lambda first, second: value))
    assert outcome.reason == reason


@pytest.mark.parametrize(
    ("moments", "reason", "boxes"),
    [
        ((), None, (None, None)),
        (((1.5, ()),), "no hands", None),
        (((1.5, ({**HAND, "name": "drawer"},)),), "no hands", None),
        (((0.5, ()), (1.5, (HAND,))), None, ([], [HAND])),
        (((0.5, (HAND,)), (3.0, ())), None, ([HAND], None)),
    ],
    ids=["unknown", "nothing", "no hand", "hand", "too far"],
)
def test_hands_are_missed_only_where_they_were_looked_for(
    run: Run, moments: Any, reason: str | None, boxes: Any
) -> None:
    (outcome,) = run(frames(), action(moments=moments))
    assert outcome.reason == reason
    assert outcome.row is None if reason else outcome.row["boxes_0"] == boxes[0]  # ty: ignore[not-subscriptable]
    if reason is None:
        assert outcome.row is not None and outcome.row["boxes_1"] == boxes[1]
    else:
        assert run(frames(), action(moments=moments), require_hands=False)[0].reason is None


def test_an_action_that_is_annotated_twice_gives_one_pair(run: Run) -> None:
    twice = [action("a"), action("b", time_0=0.53, time_1=1.47), action("c", action="close drawer")]
    assert [outcome.reason for outcome in run(frames(), *twice)] == [None, "near duplicate", None]


def test_the_same_pictures_at_another_time_are_a_duplicate(run: Run) -> None:
    shown = [textured(i % 60) for i in range(120)]
    later = action("b", time_0=2.5, time_1=3.5)
    first = action("a", time_0=0.5, time_1=1.5)
    outcomes = run(shown, first, later)
    assert [outcome.reason for outcome in outcomes] == [None, "near duplicate"]


def test_what_repeats_a_pair_of_a_manifest_is_a_duplicate(run: Run, tmp_path: Path) -> None:
    (first,) = run(frames())
    assert first.row is not None
    again, other = action("b", time_0=0.52, time_1=1.48), action("c", action="close drawer")
    videos = find_videos(tmp_path)
    outcomes = list(curate([again, other], videos, Rules(), ALIKE, earlier=[first.row]))
    assert [outcome.reason for outcome in outcomes] == ["near duplicate", None]


def test_the_target_frame_never_lies_before_the_input_frame(run: Run) -> None:
    shown = [frame if i == 18 else blurred(frame, 2 if i == 16 else 3) for i, frame in enumerate(frames())]
    (outcome,) = run(shown, action(time_0=15 / 30, time_1=18 / 30), min_sharpness=0.0)  # spans of 3 frames would meet
    assert outcome.row is not None and outcome.row["time_0"] < 16.5 / 30 <= outcome.row["time_1"]


def test_pictures_of_outcomes_are_small(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", [textured(i, 336, 240) for i in range(50)])
    outcomes = list(curate([action(), action("b")], find_videos(tmp_path), Rules(size=0), ALIKE))
    assert [outcome.reason for outcome in outcomes] == [None, "near duplicate"]
    assert {picture.size for outcome in outcomes for picture in outcome.pictures} == {(224, 160)}
    assert outcomes[0].row is not None and outcomes[0].row["image_0"].size == (336, 240)


def test_every_action_has_one_outcome_in_order_whatever_its_video_is_like(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    actions = [
        action("a", reason="bad times", time_0=None, time_1=None),
        action("b", video="absent"),
        action("c", video="broken"),
        action("d", video="broken"),
        action("e", time_0=40.0, time_1=41.0),
        action("f"),
    ]
    outcomes = run(frames(), *actions)
    assert [outcome.action.id for outcome in outcomes] == list("abcdef")
    reasons = ["bad times", "missing video", "unreadable video", "unreadable video", "outside the video", None]
    assert [outcome.reason for outcome in outcomes] == reasons
    assert set(reasons) - {None} <= set(REASONS)


def test_frames_are_stored_upright_and_reduced(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", [textured(i, 96, 64) for i in range(60)])
    turn(tmp_path / "v.mp4", 0, 1, -1, 0)
    (outcome,) = curate([action()], find_videos(tmp_path), Rules(size=32), ALIKE)
    assert outcome.row is not None and outcome.row["image_0"].size == (32, 48)
    assert reduced(PIL.Image.new("RGB", (96, 64)), 0).size == (96, 64)
    assert reduced(PIL.Image.new("RGB", (96, 64)), 256).size == (96, 64)


def test_videos_are_found_by_name_and_may_not_share_one(tmp_path: Path) -> None:
    for name in ("P01/videos/P01_01.MP4", "a.mkv", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(find_videos(tmp_path)) == ["P01_01", "a"]
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="`videos` must have one file for a name, got .*a.mkv and .*a.mp4"):
        find_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="`videos` must be a folder, found none at"):
        find_videos(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hand_left", True), ("left hand", True), ("hands", True), ("handle", False), ("drawer handle", False)],
)
def test_a_hand_is_told_by_its_name(name: str, expected: bool) -> None:
    assert is_hand({"name": name}) is expected
