"""Clips move from the frame before to the frame of the action, and curation finds what was planted in them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.kitchen import clips as module
from examples.kitchen.clips import (
    DEFECTS,
    Clip,
    ClipsConfig,
    facts,
    main,
    other_kitchen,
    plant,
    render_clip,
    write_annotations,
    write_clip,
)
from examples.kitchen.geom import box, rotation
from examples.kitchen.hand import SIDES
from examples.kitchen.motion import Moving, Screw, match
from examples.kitchen.scene import SPLITS, build
from lego_pipeline.curation.frames import REASONS, Rules, curate, find_videos
from lego_pipeline.curation.readers import Format, read_actions
from lego_pipeline.curation.similarity import COLOUR_BAND, colour_similarity, load_similarity

FILES: dict[Format, str] = {"table": "annotations.csv", "epic": "EPIC_100_train.csv", "ego4d": "fho_main.json"}


def shapes(parts: list) -> list[tuple]:
    """Parts as sorted points, whatever order they come in."""
    return sorted((part.name, *np.round(part.vertices, 4).sum(0).round(3).tolist()) for part in parts)


@pytest.mark.parametrize("index", range(4))
def test_the_ends_of_the_motion_are_the_two_stages(index: int) -> None:
    own = SPLITS["val"]
    scene = build(own.seed, index, kitchens=own.kitchens, first_kitchen=own.first_kitchen, actions=own.actions)
    moving = Moving(scene)
    sides = [{f"hand_{side}" for side in SIDES if side in grips} for grips in scene.grips]
    for k, (reach, motion) in enumerate(((0.0, 0.0), (1.0, 1.0))):
        made, expected = moving.parts(reach, motion), scene.parts[k]
        things = [[part for part in parts if not part.name.startswith("hand_")] for parts in (made, expected)]
        for first, second in zip(*map(shapes, things), strict=True):
            assert first[0] == second[0] and np.allclose(first[1:], second[1:], atol=0.05)
        hands = [[part for part in parts if part.name in sides[k]] for parts in (made, expected)]
        for first, second in zip(*map(shapes, hands), strict=True):
            assert first[0] == second[0] and np.allclose(first[1:], second[1:], atol=0.05)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 120.0, 180.0])
def test_a_screw_takes_points_along_their_motion(degrees: float) -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    hinge, turn = np.array([0.4, 0.1, 0.0]), rotation("z", degrees)
    moved = (points - hinge) @ turn.T + hinge + [0, 0, 0.2]
    screw = Screw(points, moved)
    assert screw.error < 1e-9
    halfway, shift = screw.at(0.5)
    expected = (points - hinge) @ rotation("z", degrees / 2).T + hinge + [0, 0, 0.1]
    mirrored = (points - hinge) @ rotation("z", -degrees / 2).T + hinge + [0, 0, 0.1]
    found = points @ halfway.T + shift
    assert np.allclose(found, expected) or (degrees == 180 and np.allclose(found, mirrored))  # both are halfway
    back, offset = screw.back_from_end(0.0)
    assert np.allclose(moved @ back.T + offset, points)


def test_parts_are_matched_by_shape_and_name() -> None:
    from examples.kitchen.geom import Material

    material = Material((1, 1, 1))
    still, block = box((0, 0, 0), (1, 1, 1), material, "table"), box((0, 0, 0), (0.1, 0.2, 0.3), material, "block")
    water, other = (
        box((0, 0, 0), (0.1, 0.1, 0.9), material, "water"),
        box((0, 0, 0), (0.3, 0.2, 0.1), material, "block"),
    )
    moved = block.moved(rotation("z", 20), (1, 0, 0))
    same, pairs, gone, new = match([still, block, other], [water, moved, still])
    assert [part.name for part in same] == ["table"]
    assert [(first is block, second is moved) for first, second, _ in pairs] == [(True, True)]
    assert gone == [other] and new == [water]


def test_a_clip_moves_all_the_time_and_the_same_arguments_give_the_same_frames() -> None:
    clip, again = (render_clip("val", 1, size=32, rate=5, samples=1) for _ in range(2))
    assert len(clip.frames) == len(clip.boxes) == 12
    assert all(np.array_equal(a, b) for a, b in zip(clip.frames, again.frames, strict=True))
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(clip.frames, clip.frames[1:], strict=False)]
    assert min(steps) > 0.1
    assert any(name.startswith("hand_") for name in clip.boxes[clip.near(clip.height)])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_another_kitchen_is_surely_told_apart(index: int, tmp_path: Path) -> None:
    config = ClipsConfig(clips=1, out=tmp_path, size=32, rate=5)
    clip = render_clip("train", index, size=32, rate=5, samples=1)
    spoilt = plant(clip, "too different", np.random.default_rng(0), [other_kitchen(config, index, clip)])
    first, second = (Image.fromarray(spoilt.frames[spoilt.near(time)]) for time in (0.5, 1.6))
    assert colour_similarity(first, second) < COLOUR_BAND[0]


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make_clip(config: ClipsConfig, index: int) -> Clip:
        made.append(index)
        if len(made) == 2:
            raise KeyboardInterrupt
        frames = [np.full((32, 32, 3), 40 + i, np.uint8) for i in range(12)]
        return Clip(f"P01_{index + 1:02d}", frames, [{}] * 12, 5, "take cup", "take", "cup")

    monkeypatch.setattr(module, "make_clip", make_clip)
    config = ClipsConfig(clips=3, out=tmp_path, size=32, rate=5)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    main(config)
    assert made == [0, 1, 1, 2]
    assert sorted(find_videos(tmp_path)) == ["P01_01", "P01_02", "P01_03"]
    for name, file in FILES.items():
        assert len(read_actions([tmp_path / file], name)) == 3
    with pytest.raises(ValueError, match="holds clips with other settings; name another folder"):
        main(replace(config, rate=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 33}, "`size` must be an even number"), ({"spoilt": 2.0}, "`spoilt` must be a share from 0 to 1")],
)
def test_settings_out_of_range_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ClipsConfig(**{"clips": 1, "out": tmp_path, **changes})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rendered clips, as they are and with three of every defect; two more without hands."""
    folder = tmp_path_factory.mktemp("planted")
    rendered = [render_clip("train", index, size=96, samples=1) for index in range(18)]
    handless = [render_clip("train", index, size=96, samples=1, show_hands=False) for index in (0, 3)]
    clips = []
    for number, defect in enumerate([None] * 18 + [defect for defect in DEFECTS for _ in range(3)]):
        own = handless if defect == "no hands" else rendered
        clip = replace(own[number % len(own)], video=f"P{number // 90 + 1:02d}_{number % 90 + 1:02d}")
        if defect is not None:
            clip = plant(clip, defect, np.random.default_rng(number), rendered)
        write_clip(clip, folder / "videos")
        clips.append(facts(clip))
    write_annotations(clips, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
def test_curation_finds_what_was_planted(planted: Path, format: Format) -> None:
    expected = json.loads((planted / "planted.json").read_text())
    if format == "epic":  # whose CSV has no boxes
        expected = {name: None if reason == "no hands" else reason for name, reason in expected.items()}
    if format == "ego4d":  # where the frame 0.5 s before is just not annotated then
        renamed = {"starts too early": "no critical frame"}
        expected = {name: renamed.get(reason, reason) for name, reason in expected.items()}
    actions = read_actions([planted / FILES[format]], format)
    outcomes = list(curate(actions, find_videos(planted / "videos"), Rules(), load_similarity()))
    assert len(outcomes) == len(expected)
    hits, found, there = Counter(), Counter(), Counter(expected.values())
    for outcome in outcomes:
        name = outcome.action.id.removeprefix("epic-").removeprefix("ego4d-").split("-")[0]
        found[outcome.reason] += 1
        hits[outcome.reason] += outcome.reason == expected[name]
        assert outcome.reason is None or outcome.reason in REASONS
    for reason in there | found:
        precision, recall = hits[reason] / max(found[reason], 1), hits[reason] / max(there[reason], 1)
        assert precision >= 0.95 and recall >= 0.95, f"{reason}: precision {precision:.2f}, recall {recall:.2f}"
    kept = [outcome.row for outcome in outcomes if outcome.row is not None]
    if format != "epic":
        assert all(row["boxes_0"] and row["boxes_1"] for row in kept)
