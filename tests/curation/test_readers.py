"""Annotation files of the three formats become actions: labels cleaned, times in seconds, what can't be used named."""

import json
from pathlib import Path
from typing import Any

import pytest

from lego_pipeline.curation.actions import Action, Timing, seconds, split_of
from lego_pipeline.curation.ego4d import base_form, plain_name, read_narration
from lego_pipeline.curation.epic import jpeg_time, plain_noun
from lego_pipeline.curation.readers import read_actions

TABLE = "video,start,stop,action,licence\n"
EPIC = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,narration,verb,noun\n"


def table(folder: Path, *rows: str, header: str = TABLE) -> Path:
    path = folder / "actions.csv"
    path.write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def epic(folder: Path, *rows: str, name: str = "EPIC_100_train.csv") -> Path:
    path = folder / name
    path.write_text(EPIC + "\n".join(rows) + "\n")
    return path


def times(action: Action) -> tuple[float, float]:
    assert action.time_0 is not None and action.time_1 is not None
    return round(action.time_0, 4), round(action.time_1, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("75.3", 75.3), ("00:01:15.30", 75.3), ("1:15", 75.0), (".5", 0.5), ("", None), ("-1", None), ("soon", None)],
)
def test_seconds_are_read_from_numbers_and_clock_times(text: str, expected: float | None) -> None:
    assert seconds(text) == (None if expected is None else pytest.approx(expected))


def test_a_row_of_a_table_becomes_an_action(tmp_path: Path) -> None:
    boxes = [{"time": 2.0, "boxes": [{"name": "hand_right", "x0": 0.1, "y0": 0.2, "x1": 1.4, "y1": 0.9}]}]
    quoted = json.dumps(boxes).replace('"', '""')
    header = "video,start,stop,action,licence,verb,noun,split,source,boxes,weather\n"
    row = f'clips/my.first.mp4,1.0,3.0,open drawer,CC0,open,drawer,val,home,"{quoted}",rain'
    (action,) = read_actions([table(tmp_path, row, header=header)], "table")
    assert (action.video, action.action, action.split, action.source) == ("my.first", "open drawer", "val", "home")
    assert (action.licence, action.verb, action.noun, action.facts) == ("CC0", "open", "drawer", {"weather": "rain"})
    assert times(action) == (0.75, 2.0)
    assert action.moments == ((2.0, ({"name": "hand_right", "x0": 0.1, "y0": 0.2, "x1": 1.0, "y1": 0.9},)),)


@pytest.mark.parametrize(
    ("name", "video"),
    [("2026.05.01-kitchen", "2026.05.01-kitchen"), ("b/2026.05.01.MP4", "2026.05.01"), ("v", "v")],
)
def test_a_video_is_named_with_or_without_its_suffix(tmp_path: Path, name: str, video: str) -> None:
    assert read_actions([table(tmp_path, f"{name},1,2,open drawer,CC0")], "table")[0].video == video


def test_boxes_at_many_moments_are_read(tmp_path: Path) -> None:
    moments = json.dumps([{"time": i, "boxes": []} for i in range(9000)])
    row = f'a,1,2,open drawer,CC0,"{moments.replace(chr(34), 2 * chr(34))}"'
    (action,) = read_actions([table(tmp_path, row, header=f"{TABLE[:-1]},boxes\n")], "table")
    assert len(moments) > 2**17 and len(action.moments) == 9000


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (Timing(before_seconds=0.5, target_position=1.0), (9.5, 14.0)),
        (Timing(before_seconds=1.0, after_seconds=1.5), (9.0, 11.5)),
        (Timing(before_seconds=0.0, after_seconds=9.0), (10.0, 14.0)),
    ],
)
def test_the_offsets_are_settings(tmp_path: Path, timing: Timing, expected: tuple[float, float]) -> None:
    (action,) = read_actions([table(tmp_path, "a,10,14,open drawer,CC0")], "table", timing)
    assert times(action) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,3,2,open drawer,CC0", "bad times"),
        ("a,x,2,open drawer,CC0", "bad times"),
        ("a,0.1,2,open drawer,CC0", "starts too early"),
        ("a,1,2,,CC0", "no label"),
    ],
)
def test_an_annotation_that_can_not_be_used_has_its_reason(tmp_path: Path, row: str, reason: str) -> None:
    (action,) = read_actions([table(tmp_path, row)], "table")
    assert action.reason == reason


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["a,1,2,open"],
            "video,start,stop,label\n",
            r"must have the columns video, start, stop, action, lacks action",
        ),
        (["a,1,2,open,"], TABLE, r"line 2 must have a licence; add a column `licence` or give `--licence`"),
        (
            ["a,1,2,open,CC0,dev"],
            "video,start,stop,action,licence,split\n",
            "`split` must be train, val, test or empty",
        ),
        (["a,1,2,open,CC0,[1]"], "video,start,stop,action,licence,boxes\n", "line 2: `boxes` must be JSON like"),
        (
            ["a,1,2,open,CC0,i", "b,1,2,open,CC0,i"],
            "video,start,stop,action,licence,id\n",
            "1 that occur twice, .* 'i'",
        ),
        ([], TABLE, "`annotations` must hold actions, got none in"),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    path = table(tmp_path, *rows, header=header)
    with pytest.raises(ValueError, match=message):
        read_actions([path], "table")


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`annotations` must be files, found none at"):
        read_actions([tmp_path / "none.csv"], "table")
    (tmp_path / "bytes.csv").write_bytes(b"video,start,stop,action\n\xff\xfe")
    with pytest.raises(ValueError, match="must be a CSV file in UTF-8"):
        read_actions([tmp_path / "bytes.csv"], "table", licence="CC0")


def test_epic_is_cut_by_seconds_and_never_by_the_frame_column(tmp_path: Path) -> None:
    row = "P01_01_7,P01,P01_01,00:01:01.00,00:01:03.00,999999,put pizza slice into oven,put-into,slice:pizza"
    (action,) = read_actions([epic(tmp_path, row)], "epic")
    assert times(action) == (60.75, 62.0)
    assert (action.id, action.video, action.verb, action.noun) == (
        "epic-P01_01_7",
        "P01_01",
        "put into",
        "pizza slice",
    )
    assert (action.split, action.licence, action.source) == ("train", "CC BY-NC 4.0", "EPIC-KITCHENS-100")


def test_epic_validation_files_are_val_and_overlaps_are_recorded(tmp_path: Path) -> None:
    rows = [
        "a_1,P01,a,00:00:10.00,00:00:20.00,1,open tap,open,tap",
        "a_0,P01,a,00:00:19.00,00:00:22.00,1,wash,wash,cup",
    ]
    rows += ["a_2,P01,a,00:00:30.00,00:00:31.00,1,close tap,close,tap"]
    actions = read_actions([epic(tmp_path, *rows, name="EPIC_100_validation.csv")], "epic", licence="own")
    assert [action.id for action in actions] == ["epic-a_1", "epic-a_0", "epic-a_2"]  # by time
    assert [action.facts.get("overlap_before") for action in actions] == [None, "yes", None]
    assert {action.split for action in actions} == {"val"}
    assert {action.licence for action in actions} == {"own"}


def test_epic_test_rows_without_labels_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "EPIC_100_test_timestamps.csv"
    header = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame"
    path.write_text(f"{header}\nP01_11_0,P01,P01_11,,00:00:05.00,00:00:06.00,1\n")
    (action,) = read_actions([path], "epic")
    assert action.reason == "no label"


def test_jpeg_frames_of_the_extension_are_50_a_second() -> None:
    assert (jpeg_time("P01_01", 61), jpeg_time("P01_101", 51)) == (1.0, 1.0)
    assert (plain_noun("slice:pizza"), plain_noun("tap"), plain_noun("a:b:c")) == ("pizza slice", "tap", "b c a")


# --- Ego4D -----------------------------------------------------------------------------------------------------------


def interaction(**changes: Any) -> dict[str, Any]:
    critical = {"pre_45": 55, "pre_30": 70, "pre_15": 85, "pre_frame": 100, "contact_frame": 110, "pnr_frame": 120}
    boxes = [
        {"object_type": "left_hand", "structured_noun": None, "bbox": {"x": -10, "y": 50, "width": 110, "height": 50}},
        {
            "object_type": "object_of_change",
            "structured_noun": "knife_(knife,_machete)",
            "bbox": {"x": 100, "y": 0, "width": 50, "height": 25},
        },
    ]
    return {
        "uid": "u1",
        "narration_text": "#C C picks up the knife",
        "structured_verb": "take_(pick,_grab,_get)",
        "critical_frames": critical | {"post_frame": 140},
        "clip_critical_frames": {name: number - 50 for name, number in critical.items()},
        "frames": [{"frame_type": "pnr_frame", "frame_number": 120, "clip_frame_number": 70, "boxes": boxes}],
        "is_rejected": False,
        "is_invalid_annotation": False,
        "stage": "x",
    } | changes


def ego4d(folder: Path, *actions: dict[str, Any], interval: dict[str, Any] | None = None) -> Path:
    video = {
        "video_uid": "v1",
        "video_metadata": {"fps": 30, "width": 200, "height": 100},
        "annotated_intervals": [{"clip_uid": "c1", "narrated_actions": list(actions)} | (interval or {})],
    }
    path = folder / "fho_main.json"
    path.write_text(json.dumps({"version": "2", "videos": [video]}))
    return path


def test_an_interaction_of_ego4d_becomes_an_action(tmp_path: Path) -> None:
    (action,) = read_actions([ego4d(tmp_path, interaction())], "ego4d")
    assert (action.id, action.video, action.action) == ("ego4d-u1-000000", "v1", "pick up the knife")
    assert (action.verb, action.noun, action.licence) == ("take", "knife", "Ego4D licence agreement")
    assert times(action) == (round(85 / 30, 4), 4.0)
    ((time, boxes),) = action.moments
    assert time == 4.0
    assert boxes == (
        {"name": "hand_left", "x0": 0.0, "y0": 0.5, "x1": 0.5, "y1": 1.0},
        {"name": "knife", "x0": 0.5, "y0": 0.0, "x1": 0.75, "y1": 0.25},
    )


def test_clips_of_ego4d_have_their_own_names_and_clock(tmp_path: Path) -> None:
    (action,) = read_actions([ego4d(tmp_path, interaction())], "ego4d", ego4d_clips=True)
    assert (action.video, times(action), action.moments[0][0]) == (
        "c1",
        (round(35 / 30, 4), round(70 / 30, 4)),
        70 / 30,
    )


def test_critical_frames_are_settings_and_contact_stands_in_without_a_change_of_state(tmp_path: Path) -> None:
    critical = interaction()["critical_frames"]
    path = ego4d(tmp_path, interaction(), interaction(uid="u2", critical_frames=critical | {"pnr_frame": None}))
    first, second = read_actions([path], "ego4d", Timing(ego4d_input="pre_frame"))
    assert {times(first), times(second)} == {(round(100 / 30, 4), 4.0), (round(100 / 30, 4), round(110 / 30, 4))}
    post = read_actions([path], "ego4d", Timing(ego4d_target="post_frame"))
    assert {times(action)[1] for action in post} == {round(140 / 30, 4)}


CRITICAL = interaction()["critical_frames"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_rejected": True}, "rejected annotation"),
        ({"is_invalid_annotation": True}, "rejected annotation"),
        ({"stage": None, "frames": None}, "rejected annotation"),
        ({"narration_text": "#O A man X opens the door"}, "another person"),
        ({"narration_text": None}, "no label"),
        ({"narration_text": "#unsure"}, "no label"),
        ({"critical_frames": None}, "no critical frame"),
        ({"critical_frames": CRITICAL | {"pre_15": None}}, "no critical frame"),
        ({"critical_frames": CRITICAL | {"pnr_frame": None, "contact_frame": None}}, "no critical frame"),
        ({"critical_frames": CRITICAL | {"pnr_frame": 90}}, "bad times"),
        ({"critical_frames": {"pre_15": 85, "contact_frame": 85}}, "bad times"),
    ],
)
def test_an_interaction_that_can_not_be_used_has_its_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (action,) = read_actions([ego4d(tmp_path, interaction(**changes))], "ego4d")
    assert action.reason == reason


def test_redacted_stretches_are_left_out(tmp_path: Path) -> None:
    (action,) = read_actions([ego4d(tmp_path, interaction(), interval={"redacted": True})], "ego4d")
    assert (action.reason, action.detail) == ("rejected annotation", "a redacted stretch of the video")


def test_the_older_layout_of_ego4d_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fho.json").write_text(json.dumps({"video_data": {}}))
    with pytest.raises(ValueError, match=r"must be fho_main.json of Ego4D version 2 .* `ego4d --datasets annotations"):
        read_actions([tmp_path / "fho.json"], "ego4d")


def test_a_file_of_ego4d_that_lacks_something_is_named(tmp_path: Path) -> None:
    path = ego4d(tmp_path, interaction(frames=[{"frame_number": 120, "boxes": [{"object_type": "left_hand"}]}]))
    with pytest.raises(ValueError, match="must be a whole fho_main.json of Ego4D version 2, got KeyError: 'bbox'"):
        read_actions([path], "ego4d")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("#C C opens the drawer", "open the drawer"),
        ("#C C Picks up Cup.", "pick up Cup"),
        ("#C C walks", "walk"),
        ("#c Closes it", "close it"),
    ],
)
def test_narrations_become_labels(text: str, label: str) -> None:
    verb, rest, reason = read_narration(text)
    assert (" ".join(filter(None, [verb, rest])), reason) == (label, {})


@pytest.mark.parametrize(
    ("verb", "form"),
    [("washes", "wash"), ("carries", "carry"), ("ties", "tie"), ("uses", "use"), ("presses", "press"), ("goes", "go")]
    + [
        ("squeezes", "squeeze"),
        ("has", "have"),
        ("cross", "cross"),
        ("mixes", "mix"),
        ("cut", "cut"),
        ("dries", "dry"),
    ],
)
def test_verbs_lose_the_ending_of_the_third_person(verb: str, form: str) -> None:
    assert base_form(verb) == form


def test_synonyms_in_brackets_are_cut() -> None:
    assert (plain_name("take_(pick,_grab,_get)"), plain_name("turn_off"), plain_name(None)) == ("take", "turn off", "")


def test_videos_are_split_by_their_name() -> None:
    draws = [split_of(f"video-{i}", Timing(val_share=0.25)) for i in range(400)]
    assert 70 < draws.count("val") < 130
    assert draws == [split_of(f"video-{i}", Timing(val_share=0.25)) for i in range(400)]
