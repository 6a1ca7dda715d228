"""LegoCuratePairs: videos and annotations of the input folder become lists of images, a manifest and a report."""

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.curation.similarity import load_similarity
from lego_pipeline.data.manifest import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Run = Callable[..., tuple[Any, ...]]


def write_video(path: Path, before: Any, target: Any) -> None:
    """Two seconds, 10 frames a second: the frame before the action, from 1.0 s on the action; a dot keeps moving."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(20):
            pixels = np.array((before if number < 10 else target).convert("RGB"))
            pixels[4 * number : 4 * number + 12, 4 * number : 4 * number + 12] = (200, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(comfyui: Path) -> Iterator[Path]:
    """`input/cooking`: three videos of an action that can be kept, and a table with one more, of a missing video."""
    folder = comfyui / "input" / "cooking"
    rows = [{"video": "gone", "start": 1.0, "stop": 1.9, "action": "take cup"}]
    measure = load_similarity(None)
    low, high = measure.band
    pairs = [
        row for row in read_manifest(FRAMES) if low + 0.02 < measure(row["image_0"], row["image_1"]) < high - 0.02
    ]
    for row in pairs[:3]:
        write_video(folder / "videos" / f"{row['id']}.mp4", row["image_0"], row["image_1"])
        rows.append({"video": row["id"], "start": 1.0, "stop": 1.9, "action": row["action"]})
    with open(folder / "actions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    yield folder
    shutil.rmtree(folder)


INPUTS = {"videos": "input/cooking/videos", "annotations": "input/cooking/actions.csv", "format": "table"}
INPUTS |= {"licence": "CC0", "name": "cooking", "count": 2}


def test_folders_and_files_of_the_input_folder_are_offered(clips: Path, nodes_of_pack: dict[str, Any]) -> None:
    schema = nodes_of_pack["LegoCuratePairs"].define_schema()
    offered = {item.id: item.options for item in schema.inputs if item.id in ("videos", "annotations")}
    assert offered["videos"] == ["input/cooking/videos"]
    assert offered["annotations"] == ["input/cooking/actions.csv"]


def test_pairs_come_out_as_lists_and_the_rest_is_counted(clips: Path, run_node: Run, comfyui: Path) -> None:
    first, second, actions, report = run_node("LegoCuratePairs", **INPUTS)
    manifest = read_manifest(comfyui / "output" / "lego_pairs" / "cooking" / "manifest")
    assert len(manifest) == 3 and set(manifest["licence"][:]) == {"CC0"}
    assert len(first) == len(second) == len(actions) == 2
    assert actions == manifest["action"][:2]
    for image, row in zip(first, manifest, strict=False):
        assert image.shape == (1, 128, 128, 3)
        assert np.abs(image[0].numpy() * 255 - np.array(row["image_0"].convert("RGB"))).max() < 1
    assert "3 pairs of 4 actions" in report and "1 dropped, missing video" in report
    assert "colour histograms" in report
    assert (comfyui / "output" / "lego_pairs" / "cooking" / "report.html").is_file()


def test_a_second_run_decodes_nothing(clips: Path, run_node: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_node("LegoCuratePairs", **INPUTS)
    monkeypatch.setattr(av, "open", None)
    assert run_node("LegoCuratePairs", **INPUTS)[3] == before[3]


def test_a_stopped_one_takes_up_added_videos_and_a_finished_one_asks_for_a_new_name(
    clips: Path, nodes_of_pack: dict[str, Any], run_node: Run, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, inputs = nodes_of_pack["LegoCuratePairs"], INPUTS | {"name": "growing", "count": 9}
    before, calls = node.fingerprint_inputs(**inputs), []

    def stop_after_two() -> None:
        calls.append(None)
        if len(calls) > 2:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(adapter, "stop_if_asked", stop_after_two)
        run_node("LegoCuratePairs", **inputs)
    video = next((clips / "videos").glob("*.mp4"))
    added = shutil.copy(video, clips / "videos" / "gone.mp4")
    try:
        assert node.fingerprint_inputs(**inputs) != before
        first = run_node("LegoCuratePairs", **inputs)
        assert len(first[0]) == 4 and "4 pairs of 4 actions" in first[3]
        after = node.fingerprint_inputs(**inputs)
        (clips / "videos" / "thumbnail.jpg").write_bytes(b"1")  # no video
        video.touch()  # a copy keeps no times
        assert node.fingerprint_inputs(**inputs) == after
        assert run_node("LegoCuratePairs", **inputs)[3] == first[3]
    finally:
        Path(added).unlink()
    with pytest.raises(ValueError, match="`name` must be a new one, got 'growing': .* other videos"):
        run_node("LegoCuratePairs", **inputs)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"name": "../escape"}, "name"),
        ({"name": " "}, "name"),
        ({"videos": "/etc"}, "videos"),
        ({"annotations": "input/../../secret.csv"}, "annotations"),
        ({"licence": "", "name": "other"}, "licence"),
        ({"licence": "CC-BY"}, "licence"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], name: str, clips: Path, run_node: Run) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        run_node("LegoCuratePairs", **(INPUTS | {"name": "cooking"} | changes))
