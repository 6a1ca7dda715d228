"""`lego convert data` on made-up released files, from there to pictures, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lego_pipeline import LegoPipeline
from lego_pipeline.cli import main
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.vlm import llava

COUNT = 3


@pytest.fixture
def released(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The released files of three pairs, in the current folder."""
    monkeypatch.chdir(tmp_path)
    clips: dict[str, dict[str, dict[str, str]]] = {"clip": {}}
    random = np.random.default_rng(0)
    for i in range(COUNT):
        paths = {f"image_{k}": f"clip/{i}/frame_{i + k:08d}.jpg" for k in (0, 1)}
        text = {"action": f"#C C opens drawer {i}", "llava_forecast_finetune": f"The hand opens drawer {i}."}
        clips["clip"][str(i)] = paths | text
        for k in (0, 1):
            path = Path("val", paths[f"image_{k}"])
            path.parent.mkdir(parents=True, exist_ok=True)
            make_frame(40, 24, 2 * i + k).save(path)
        for kind, rows in (("image", 4), ("text", 2 + i)):
            path = Path(f"{kind}_feature", "llava", "val", paths["image_0"].replace("jpg", "npy"))
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, random.standard_normal((rows, 32)).astype(np.float16))
    Path("val.json").write_text(json.dumps(clips))
    Path("metadata.json").write_text(json.dumps({"clip": {"height": 240, "width": 400}}))
    return tmp_path


FLAGS = ("convert", "data", "--pairs", "val.json", "--frames", "val", "--output", "manifest")
FEATURES = (
    "--image-features",
    "image_feature/llava/val",
    "--text-features",
    "text_feature/llava/val",
    "--cache",
    "cache",
)


def test_from_the_released_files_to_pictures_without_a_vlm(
    released: Path,
    make_tiny_pipeline: Callable[..., LegoPipeline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(llava, "embed", lambda *_, **__: pytest.fail("the VLM was called"))
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained("ldm")
    assert main([*FLAGS, *FEATURES, "--metadata", "metadata.json", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"ok": True, "pairs": 3, "shards_written": 1, "entries_added": 6, "left_out": {}}
    for parity in ((), ("--parity", "paper")):
        flags = ("--model", "ldm", "--data", "manifest", "--cache", "cache", "--output", "out", "--steps", "2")
        assert main(["generate", *flags, *parity]) == 0
    found = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.*g"))
    paper = [f"ldm-e=0-s=2-si=1.5/images/clip/{i}/frame_{i + 1:08d}.jpg" for i in range(COUNT)]
    assert found == sorted([*(f"clip_{i}.png" for i in range(COUNT)), *paper])
    with PIL.Image.open(Path("out", paper[0])) as picture:
        assert picture.size == (53, 32)  # the clip's aspect at the model's height


def test_a_second_run_writes_nothing(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FLAGS, *FEATURES])
    capsys.readouterr()
    assert main([*FLAGS, *FEATURES]) == 0
    assert capsys.readouterr().out == "manifest: 3 pairs, 0 shards written\ncache: 0 entries added\n"


def test_what_is_missing_is_listed_and_nothing_else_is_written(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("val/clip/1/frame_00000001.jpg").unlink()
    Path("text_feature/llava/val/clip/1/frame_00000001.npy").unlink()
    assert main([*FLAGS, *FEATURES]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "missing: 1 start frames (val/clip/1/frame_00000001.jpg); 1 text features (" in err
    assert err.endswith("manifest/missing.txt names all. Get them, or leave these pairs out with `--skip-missing`.")
    assert [path.name for path in Path("manifest").iterdir()] == ["missing.txt"]
    assert not Path("cache").exists()


def test_pairs_that_lack_something_may_be_left_out(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("val/clip/1/frame_00000001.jpg").unlink()
    assert main([*FLAGS, "--skip-missing", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left_out"] == {"start frames": 1} and "missing: 1 start frames" in captured.err
    assert read_manifest("manifest")["id"][:] == ["clip_0", "clip_2"]


def test_what_was_missing_is_no_longer_listed_when_it_is_there(released: Path) -> None:
    frame = Path("val/clip/1/frame_00000001.jpg")
    content = frame.read_bytes()
    frame.unlink()
    assert main([*FLAGS]) == 2 and Path("manifest/missing.txt").exists()
    frame.write_bytes(content)
    assert main([*FLAGS]) == 0 and not Path("manifest/missing.txt").exists()


def test_features_may_be_imported_for_a_manifest_that_is_there(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLAGS]) == 0 and main([*FLAGS, *FEATURES]) == 0
    assert capsys.readouterr().out.endswith("manifest: 3 pairs, 0 shards written\ncache: 6 entries added\n")


def test_the_papers_labels_keep_the_oddities(released: Path) -> None:
    text = Path("val.json").read_text().replace("#C C opens drawer 0", "#C Closes it.")
    Path("val.json").write_text(text)
    for output, flags in {"clean": (), "cut": ("--label-oddities", "cut"), "paper": ("--parity", "paper")}.items():
        assert main([*FLAGS, "--output", output, *flags]) == 0
    actions = [read_manifest(output)[0]["action"] for output in ("clean", "cut", "paper")]
    assert actions == ["close it", "oses it", "oses it."]


def test_tuning_conversations_become_a_manifest(released: Path) -> None:
    question = "How does the person properly open it that is displayed in the video frame?\n<image>"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "So."}]
    Path("tuning.json").write_text(json.dumps([{"image": "clip/0/frame_00000000.jpg", "conversations": turns}]))
    flags = ["--tuning", "tuning.json", "--frames", "val", "--output", "tuning", "--split", "train"]
    assert main(["convert", "data", *flags]) == 0
    [row] = read_manifest("tuning", "train")
    assert (row["action"], row["description"]) == ("open it", "So.")


REFUSED = {
    "no file": (["--frames", "val", "--output", "out"], "`--pairs` or `--tuning` must be given"),
    "both files": ([*FLAGS[2:], "--tuning", "val.json"], "only one of them"),
    "no such file": (["--pairs", "no.json", "--frames", "val", "--output", "out"], "no.json"),
    "no such folder": (["--pairs", "val.json", "--frames", "no", "--output", "out"], "`--frames` must be a folder"),
    "features of one kind": ([*FLAGS[2:], *FEATURES[:2]], "must be given together"),
    "features without descriptions": ([*FLAGS[2:], *FEATURES, "--text-key", ""], "`--text-key` must name"),
    "a question of pairs": ([*FLAGS[2:], "--question-template", "{}?"], "`--question-template` must be left out"),
    "a cache among the shards": ([*FLAGS[2:], *FEATURES[:-1], "manifest/cache"], "`--cache` must be outside"),
    "a split that is a path": ([*FLAGS[2:], "--split", "../val"], "`--split` must be a name"),
    "metadata of tuning": (
        ["--tuning", "val.json", "--frames", "val", "--output", "out", "--metadata", "metadata.json"],
        "`--metadata` must be left out with `--tuning`",
    ),
    "the paper's labels of tuning": (
        ["--tuning", "val.json", "--frames", "val", "--output", "out", "--parity", "paper"],
        "`--parity` must be left out with `--tuning`",
    ),
    "output that is a file": (["--pairs", "val.json", "--frames", "val", "--output", "val.json"], "is a file"),
    "no pair": (["--pairs", "empty.json", "--frames", "val", "--output", "out"], "at least one complete pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_says_why_in_one_line_and_writes_nothing(
    case: str, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.json").write_text("{}")
    argv, expected = REFUSED[case]
    assert main(["convert", "data", *argv]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err.splitlines()[-1] and captured.out == ""
    assert not any(Path(name).exists() for name in ("out", "manifest", "cache"))
