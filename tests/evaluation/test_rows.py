"""Floor, ceiling and doubt: what the rows beside the systems show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation import rows
from lego_pipeline.evaluation.metrics.base import Frame
from lego_pipeline.evaluation.rows import Pairs


def pixels(row: rows.Row, number: int) -> np.ndarray:
    read = row.pictures[number]
    assert read is not None
    return np.asarray(Frame(read()).image).astype(int)


def test_the_copied_input_is_the_input(pairs: Pairs):
    assert (pixels(rows.copied_input(pairs), 3) == 103).all()


def test_the_mean_target_is_the_mean_of_the_training_targets(pairs: Pairs, manifest: Path, tmp_path: Path):
    train = read_manifest(manifest, "train")
    row = rows.mean_target(pairs, train, tmp_path)
    targets = [np.asarray(image, float) for image in train["image_1"]]
    assert row.kind == "floor" and row.count == 12
    assert np.abs(pixels(row, 0) - np.mean(targets, 0)).max() <= 0.5
    [kept] = tmp_path.iterdir()
    kept.write_bytes(b"kept as it is")
    assert rows.mean_target(pairs, train, tmp_path).pictures[0]() == kept and kept.read_bytes() == b"kept as it is"


def test_the_round_trip_is_what_the_vae_makes_of_the_target(
    tiny_folder: Path, tiny_pipeline: LegoPipeline, make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
):
    sizes = [(32, 32), (40, 24), (32, 32)]
    frames = [
        {"id": str(i), "image_1": make_frame(*size, i), "image_0": make_frame(32, 32)} for i, size in enumerate(sizes)
    ]
    write_shard([{**frame, "action": "open drawer"} for frame in frames], tmp_path / "pairs.parquet")
    pairs = Pairs(read_manifest(tmp_path / "pairs.parquet"))
    row = rows.round_trip(pairs, tiny_folder, tmp_path / "kept")
    assert [pixels(row, i).shape[:2] for i in range(3)] == [(32, 32), (24, 40), (32, 32)]
    values = torch.from_numpy(np.array(make_frame(32, 32, 2))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        decoded = tiny_pipeline.vae.decode(tiny_pipeline.vae.encode(values).latent_dist.mode()).sample
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(pixels(row, 2) - expected).max() <= 0.51
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.png")}
    assert len(times) == 3
    rows.round_trip(pairs, tiny_folder, tmp_path / "kept")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.png")}


def test_a_folder_without_a_vae_is_refused(pairs: Pairs, tmp_path: Path):
    with pytest.raises(ValueError, match="`--pipeline`"):
        rows.round_trip(pairs, tmp_path, tmp_path / "kept")


def test_another_true_frame_has_the_same_action_and_is_the_nearest_in_its_video(pairs: Pairs):
    # Every fourth pair has one action, every third one video: none of three equal actions shares a video.
    [other] = rows.other_true_frames(pairs)
    assert other.name == rows.OTHER_VIDEO and other.kind == "doubt" and other.count == 12
    target = pairs.frame("image_1", 4)
    assert (pixels(other, 0) == np.asarray(target.image)).all()  # the next with this action
    for fact in pairs.facts:
        fact["video"] = "one"
    [same] = rows.other_true_frames(pairs)
    assert same.name == rows.SAME_VIDEO
    assert (pixels(same, 8) == np.asarray(target.image)).all()  # 4 s away, pair 0 is 8 s away


def test_a_target_that_two_pairs_share_is_no_other_frame(manifest_rows: list[dict[str, Any]], tmp_path: Path):
    shared = [{**manifest_rows[0], "id": name} for name in "ab"]
    write_shard([*shared, manifest_rows[1]], tmp_path / "pairs.parquet")
    assert rows.other_true_frames(Pairs(read_manifest(tmp_path / "pairs.parquet"))) == []


def test_videos_are_clusters_only_where_pairs_share_them(pairs: Pairs):
    assert pairs.clusters() == [f"video {i % 3}" for i in range(12)]
    for i, fact in enumerate(pairs.facts):
        fact["video"] = str(i)
    assert pairs.clusters() is None
    pairs.facts[0]["video"] = None
    assert pairs.clusters() is None


def test_pairs_without_a_target_are_refused_by_name(manifest_rows: list[dict[str, Any]], tmp_path: Path):
    write_shard([manifest_rows[0], {**manifest_rows[1], "image_1": None}], tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="1 without, such as 'pair-01'"):
        Pairs(read_manifest(tmp_path / "pairs.parquet"))


def test_the_digest_of_the_data_changes_with_a_frame_and_with_an_action(
    pairs: Pairs, manifest_rows: list[dict[str, Any]], tmp_path: Path
):
    digests = {pairs.digest()}
    changes = ({"image_0": manifest_rows[1]["image_0"]}, {"image_1": manifest_rows[1]["image_1"]}, {"action": "take"})
    for number, change in enumerate(changes):
        path = tmp_path / f"{number}.parquet"
        write_shard([{**manifest_rows[0], **change}, *manifest_rows[1:]], path)
        digests.add(Pairs(read_manifest(path)).digest())
    assert len(digests) == 4
