"""Swapped actions: another verb or noun of the data, the same for a row whatever else is asked, in a manifest."""

from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
from datasets import Image

from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation.swap import Action, parts_of, swap_actions, write_swapped

OPEN_DRAWER, CLOSE_DRAWER = Action("open drawer", "open", "drawer"), Action("close drawer", "close", "drawer")
OPEN_FRIDGE, PUSH_DRAWER = Action("open fridge", "open", "fridge"), Action("push drawer", "push", "drawer")
TAKE_CUP = Action("take cup", "take", "cup")
IDS = ["a", "b", "c", "d", "e"]


def test_a_swapped_verb_keeps_the_noun_and_a_swapped_noun_the_verb():
    actions = [OPEN_DRAWER, CLOSE_DRAWER, OPEN_FRIDGE, TAKE_CUP, OPEN_DRAWER]
    assert swap_actions(IDS, actions, "verb") == [CLOSE_DRAWER, OPEN_DRAWER, None, None, CLOSE_DRAWER]
    assert swap_actions(IDS, actions, "noun") == [OPEN_FRIDGE, None, OPEN_DRAWER, None, OPEN_FRIDGE]


def test_the_id_decides_between_several_actions():
    actions = [OPEN_DRAWER, CLOSE_DRAWER, PUSH_DRAWER]
    many = swap_actions([f"row {i}" for i in range(60)], actions * 20, "verb")
    assert {action.verb for action in many[::3] if action} == {"close", "push"}
    assert swap_actions(["row 0", "x", "y"], actions, "verb")[0] == many[0]


def test_a_label_without_its_parts_is_split_after_the_first_word():
    assert parts_of("open kitchen drawer", None, None) == Action("open kitchen drawer", "open", "kitchen drawer")
    assert parts_of("opens it", "open", "drawer") == Action("opens it", "open", "drawer")


def test_a_manifest_of_swapped_actions_has_the_frames_and_nothing_that_tells_the_old_action(
    make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
):
    rows = [
        {"id": name, "image_0": make_frame(16, 16, i), "image_1": make_frame(16, 16, 9), "action": action.action}
        | {"verb": action.verb, "noun": action.noun, "description": "I do it.", "split": "test", "video": "v"}
        for i, (name, action) in enumerate(zip(IDS, [OPEN_DRAWER, CLOSE_DRAWER, OPEN_FRIDGE], strict=False))
    ]
    write_shard(rows, tmp_path / "data" / "test.parquet")
    data = read_manifest(tmp_path / "data").cast_column("image_0", Image(decode=False))
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "swapped-000500.parquet").write_bytes(b"of a longer run")
    assert write_swapped(data, tmp_path / "swapped") == {"verb": 2, "noun": 2}
    swapped = read_manifest(tmp_path / "swapped", "test")
    assert dict(zip(swapped["id"][:], swapped["action"][:], strict=True)) == {
        "a--verb": "close drawer",
        "a--noun": "open fridge",
        "b--verb": "open drawer",
        "c--noun": "open drawer",
    }
    assert swapped["swap_of"][:] == ["a", "a", "b", "c"]
    assert set(swapped["description"][:]) == {None} and swapped[0]["image_1"] is None
    assert swapped[0]["image_0"].tobytes() == make_frame(16, 16, 0).tobytes() and swapped["video"][:] == ["v"] * 4


def test_actions_that_share_nothing_are_refused(make_frame: Callable[..., PIL.Image.Image], tmp_path: Path):
    write_shard([{"id": "a", "image_0": make_frame(16, 16), "action": "open drawer"}], tmp_path / "a.parquet")
    data = read_manifest(tmp_path).cast_column("image_0", Image(decode=False))
    with pytest.raises(ValueError, match="share a verb or a noun"):
        write_swapped(data, tmp_path / "swapped")
