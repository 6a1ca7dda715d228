"""Released splits, metadata and tuning conversations, made up in the form of the release."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.released import pairs as module
from lego_pipeline.data.released.labels import ODDITIES
from lego_pipeline.data.released.pairs import Pairs, read_split, read_tuning, write_manifest

QUESTION = "How does the person properly {} that is displayed in the video frame?"


def entry(clip: str, action: str, label: str = "#C C Opens the drawer", **changes: Any) -> dict[str, Any]:
    paths = {f"image_{k}": f"{clip}/{action}/frame_{900 + 30 * k:08d}.jpg" for k in (0, 1)}
    return {**paths, "action": label, "llava_forecast_finetune": f"The hand acts in {action}.", "other": 1, **changes}


@pytest.fixture
def split(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]) -> Callable[..., Pairs]:
    """Writes the files of three pairs in two clips, changed as asked, and reads them."""

    def read(change: Callable[[dict, Path], Any] = lambda *_: None, **options: Any) -> Pairs:
        clips = {"clip-b": {"a1": entry("clip-b", "a1"), "a2": entry("clip-b", "a2", "#C C walks")}}
        clips["clip-a"] = {"7": entry("clip-a", "7")}
        frames = tmp_path / "val"
        for action in (action for actions in clips.values() for action in actions.values()):
            for k in (0, 1):
                path = frames / action[f"image_{k}"]
                path.parent.mkdir(parents=True, exist_ok=True)
                make_frame(32, 24, k).save(path, quality=95)
        change(clips, frames)
        (tmp_path / "val.json").write_text(json.dumps(clips))
        sizes = {clip: {"height": 1080, "width": 1440, "fps": 30} for clip in ("clip-a", "clip-b")}
        (tmp_path / "metadata.json").write_text(json.dumps(sizes))
        return read_split(tmp_path / "val.json", frames, split="val", **options)

    return read


def test_pairs_become_rows_in_the_order_of_the_file(split: Callable[..., Pairs], tmp_path: Path) -> None:
    pairs = split(metadata=tmp_path / "metadata.json")
    assert not pairs.missing
    assert [pair.row["id"] for pair in pairs.complete] == ["clip-b_a1", "clip-b_a2", "clip-a_7"]
    row = pairs.complete[0].row
    expected = {"action": "open the drawer", "verb": "open", "noun": "drawer", "video": "clip-b", "split": "val"}
    expected |= {"description": "The hand acts in a1.", "time_0": 30.0, "time_1": 31.0}
    expected |= {"frame_path": "clip-b/a1/frame_00000930.jpg", "clip_width": 1440, "clip_height": 1080}
    assert {name: row[name] for name in expected} == expected


def test_the_manifest_holds_the_files_as_they_are(split: Callable[..., Pairs], tmp_path: Path) -> None:
    pairs = split()
    assert write_manifest(pairs.complete, tmp_path / "out", {}) == 1
    rows = read_manifest(tmp_path / "out", "val")
    assert rows["id"][:] == ["clip-b_a1", "clip-b_a2", "clip-a_7"]
    path = tmp_path / "val" / "clip-b" / "a1" / "frame_00000930.jpg"
    assert rows[0]["image_1"].tobytes() == PIL.Image.open(path).tobytes()
    assert rows.with_format("arrow")[0]["image_1"][0].as_py()["bytes"] == path.read_bytes()
    assert rows[0]["frame_path"] == "clip-b/a1/frame_00000930.jpg" and rows[0]["clip_width"] is None


def test_shards_that_are_there_are_kept_and_others_not_mixed_in(
    split: Callable[..., Pairs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    pairs = split()
    assert write_manifest(pairs.complete, tmp_path / "out", {"file": "a"}) == 2
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    shards[0].unlink()
    times = shards[1].stat().st_mtime_ns
    assert write_manifest(pairs.complete, tmp_path / "out", {"file": "a"}) == 1
    assert shards[0].exists() and shards[1].stat().st_mtime_ns == times
    for other, facts in ((pairs.complete, {"file": "b"}), (pairs.complete[:2], {"file": "a"})):
        with pytest.raises(
            ValueError, match="`output` must be a new folder, but .*out holds a manifest of other files"
        ):
            write_manifest(other, tmp_path / "out", facts)


def test_the_papers_labels_keep_their_oddities(split: Callable[..., Pairs]) -> None:
    def change(clips: dict, _: Path) -> None:
        clips["clip-a"]["7"]["action"] = "#C Picks up Cup."

    clean, paper = (split(change, oddities=oddities).complete[2].row["action"] for oddities in ((), ODDITIES))
    assert (clean, paper) == ("pick up cup", "cks up Cup.")


def test_everything_that_is_missing_is_counted_and_named_at_once(split: Callable[..., Pairs], tmp_path: Path) -> None:
    features = {kind: tmp_path / kind for kind in ("image", "text")}

    def change(clips: dict, frames: Path) -> None:
        clips["clip-b"]["a1"]["action"] = "#O a man talks"
        del clips["clip-b"]["a2"]["llava_forecast_finetune"]
        (frames / clips["clip-b"]["a2"]["image_0"]).unlink()
        (frames / clips["clip-b"]["a2"]["image_1"]).write_bytes(b"")
        clips["clip-a"]["8"] = entry("clip-a", "8", image_1="../outside.jpg")
        clips["clip-c"] = {"1": "text", "2": {**entry("clip-a", "7"), "image_1": "clip-c/2/frame_00000001.jpg"}}
        for kind, folder in features.items():
            path = folder / f"clip-a/7/frame_00000900.{'npy' if kind == 'image' else 'jpg'}"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"x")

    pairs = split(change, features=features, metadata=tmp_path / "metadata.json")
    counts = {kind: len(names) for kind, names in pairs.missing.items()}
    assert not pairs.complete
    assert counts == {
        "unusable labels": 1,
        "descriptions (llava_forecast_finetune)": 1,
        "start frames": 1,
        "target frames": 2,
        "image features": 2,
        "text features": 4,
        "bad entries": 2,
        "clip sizes in the metadata": 1,
    }
    report, listing = pairs.report(shown=1), pairs.listing()
    assert "another person acts: '#O a man talks'" in report and ", and 3 more)" in report
    assert "`image_1` must be a path below the folder of frames, got '../outside.jpg'" in listing
    assert str(tmp_path / "text" / "clip-b" / "a2" / "frame_00000900.npy") in listing
    assert len(listing.splitlines()) == sum(counts.values()) + len(counts)


def test_features_are_named_as_the_release_names_them_with_every_jpg_replaced(
    split: Callable[..., Pairs], tmp_path: Path
) -> None:
    pairs = split(
        lambda clips, _: clips.update({"jpg-clip": {"1": entry("jpg-clip", "1")}}), features={"text": tmp_path}
    )
    assert str(tmp_path / "npy-clip" / "1" / "frame_00000900.npy") in pairs.missing["text features"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "must hold an object, got list"), ("{", "must be JSON, got"), (None, "there is no file")],
)
def test_a_file_of_another_form_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "val.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        read_split(tmp_path / "val.json", tmp_path, split="val")


def turns(question: str, answer: str = " The hand opens it. ") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_tuning_conversations_become_frames_with_descriptions(
    tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]
) -> None:
    make_frame(32, 24).save(tmp_path / "frame_00000060.jpg")
    image = "frame_00000060.jpg"
    entries = [
        {"id": "x/1", "image": image, "conversations": turns(QUESTION.format("open the drawer") + "\n<image>")},
        {"image": image, "conversations": turns("<image>\n" + QUESTION.format("walk"))},
        {"image": "none.jpg", "conversations": turns(QUESTION.format("walk"))},
        {"image": image, "conversations": turns("What happens?")},
        {"image": image, "conversations": [{"from": "gpt", "value": "a"}]},
        {"id": "mute", "image": image, "conversations": turns(QUESTION.format("walk"), " ")},
        {"id": "hole", "image": image, "conversations": turns(QUESTION.format(" "))},
    ]
    (tmp_path / "tuning.json").write_text(json.dumps(entries))
    pairs = read_tuning(tmp_path / "tuning.json", tmp_path)
    assert {kind: len(names) for kind, names in pairs.missing.items()} == {"start frames": 1, "bad entries": 4}
    assert "does not fit the template: 'What happens?'" in pairs.listing()
    write_manifest(pairs.complete, tmp_path / "out", {})
    rows = read_manifest(tmp_path / "out", "train")
    assert rows["id"][:] == ["x_1", "frame_00000060"]
    assert rows["action"][:] == ["open the drawer", "walk"]
    assert rows[0]["description"] == "The hand opens it." and rows[0]["time_0"] == 2.0
    assert rows[0]["image_1"] is None


def test_tuning_questions_may_be_put_otherwise(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]) -> None:
    make_frame(32, 24).save(tmp_path / "a.jpg")
    (tmp_path / "tuning.json").write_text(
        json.dumps([{"image": "a.jpg", "conversations": turns("<image>(Do) walk?")}])
    )
    pairs = read_tuning(tmp_path / "tuning.json", tmp_path, question_template="(Do) {}?")
    assert pairs.complete[0].row["action"] == "walk"
