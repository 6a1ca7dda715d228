"""`lego generate --data` on the tiny pipeline: whole manifests, with and without a VLM, as now and as in the paper."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import LegoPipeline, parity
from lego_pipeline.cli import main
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.records import PNG_KEY
from lego_pipeline.data.embedding_cache import EmbeddingCache, imported_recipe
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.data.shards import pixel_key
from lego_pipeline.vlm import llava

ROOT = Path(__file__).parents[2]
COUNT = 5
ACTIONS = ("open drawer", "take cup", "close tap", "cut bread", "wash pan")


def jpeg(image: PIL.Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.fixture(scope="session")
def rows(make_frame: Callable[..., PIL.Image.Image]) -> list[dict[str, Any]]:
    """Pairs of two aspects, JPEG files as released, one row of the test split."""
    sizes = [(32, 32), (40, 24)]
    return [
        {
            "id": f"clip{i // 2}_{i}",
            "image_0": jpeg(make_frame(*sizes[i % 2], i)),
            "action": ACTIONS[i],
            "description": f"The hand does it in way {i}.",
            "split": "test" if i == COUNT - 1 else "val",
            "frame_path": f"clip{i // 2}/{i}/frame_{i:08d}.jpg",
            "clip_width": 1440,
            "clip_height": 1080,
        }
        for i in range(COUNT)
    ]


@pytest.fixture(scope="session")
def data(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    write_shard(rows[:3], folder / "a.parquet")
    write_shard(rows[3:], folder / "b.parquet")
    return folder


@pytest.fixture(scope="session")
def no_vlm(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline without a VLM, as `lego convert ldm` makes one."""
    folder = tmp_path_factory.mktemp("saved") / "ldm"
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def features(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of imported features of all rows."""
    cache, recipe = EmbeddingCache(tmp_path_factory.mktemp("features")), imported_recipe("a VLM", 4, 32)
    cache.add_recipe(recipe)
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        pixels = pixel_key(PIL.Image.open(io.BytesIO(row["image_0"])))
        frame, text = cache.keys(pixels, row["action"], recipe, row["description"])
        cache.add_frame(frame, torch.randn(4, 32, generator=generator))
        cache.add_text(text, row["description"], torch.randn(3, 32, generator=generator))
    cache.write()
    return cache.folder


@pytest.fixture
def generate(
    data: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict, str]]:
    """Runs `lego generate --data --json`: exit code, result, standard error."""

    def run(output: Path, *argv: object, model: Path = tiny_folder, manifest: Path = data) -> tuple[int, dict, str]:
        flags = ["generate", "--model", model, "--data", manifest, "--output", output, "--steps", 2, "--json"]
        code = main([*map(str, flags), *map(str, argv)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Pixels of all pictures below a folder, by path."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".png", ".jpg")]
    return {str(file.relative_to(folder)): np.asarray(PIL.Image.open(file)).astype(int) for file in files}


def assert_same(first: Path, second: Path, tolerance: int = 1) -> None:
    a, b = pictures(first), pictures(second)
    assert a and a.keys() == b.keys()
    for name, pixels in a.items():
        assert pixels.shape == b[name].shape and np.abs(pixels - b[name]).max() <= tolerance, name


def record_of(path: Path) -> dict:
    with PIL.Image.open(path) as picture:
        return json.loads(picture.info[PNG_KEY])


# --- By default ------------------------------------------------------------------------------------------------------


def test_every_row_gets_a_picture_of_its_frames_size_and_a_record(
    rows: list[dict[str, Any]], tmp_path: Path, generate: Callable
) -> None:
    code, result, _ = generate(tmp_path)
    assert code == 0 and result["ok"] and result["written"] == COUNT
    shapes = {name: pixels.shape for name, pixels in pictures(tmp_path).items()}
    assert shapes == {f"{row['id']}.png": [(32, 32, 3), (24, 40, 3)][i % 2] for i, row in enumerate(rows)}
    lines = [json.loads(line) for line in (tmp_path / "generation.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert lines[1] == record_of(tmp_path / f"{rows[1]['id']}.png")
    assert len({line["seed"] for line in lines}) == COUNT
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", *[".png"] * COUNT]


def test_another_batch_size_gives_the_same_pictures(tmp_path: Path, generate: Callable) -> None:
    generate(tmp_path / "one")
    generate(tmp_path / "three", "--batch-size", 3)
    assert_same(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "one" / "generation.jsonl").read_text() == (tmp_path / "three" / "generation.jsonl").read_text()


def test_a_split_gives_its_rows_only(tmp_path: Path, generate: Callable) -> None:
    generate(tmp_path / "test", "--split", "test")
    generate(tmp_path / "all")
    [name] = pictures(tmp_path / "test")
    assert name == "clip2_4.png"
    assert np.array_equal(pictures(tmp_path / "test")[name], pictures(tmp_path / "all")[name])


def test_a_picture_is_that_of_its_frame_alone_with_its_seed(
    rows: list[dict[str, Any]], tmp_path: Path, tiny_folder: Path, generate: Callable
) -> None:
    generate(tmp_path / "all", "--batch-size", 5)
    (tmp_path / "frame.jpg").write_bytes(rows[3]["image_0"])
    seed = record_of(tmp_path / "all" / "clip1_3.png")["seed"]
    flags = ["--image", tmp_path / "frame.jpg", "--action", ACTIONS[3], "--seed", seed, "--steps", 2]
    assert (
        main(["generate", "--model", str(tiny_folder), *map(str, flags), "--output", str(tmp_path / "one.png")]) == 0
    )
    alone = np.asarray(PIL.Image.open(tmp_path / "one.png")).astype(int)
    assert np.abs(alone - pictures(tmp_path / "all")["clip1_3.png"]).max() <= 1


def test_the_manifests_descriptions_are_taken_on_demand(
    rows: list[dict[str, Any]], tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava, "generate", lambda *_, **__: pytest.fail("a description was sampled"))
    assert generate(tmp_path, "--descriptions", "manifest")[0] == 0
    assert record_of(tmp_path / "clip0_1.png")["description"] == rows[1]["description"]


def test_what_is_there_already_is_not_made_again(
    tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tmp_path)
    monkeypatch.setattr(Generate, "load", lambda self, **_: pytest.fail("the model was loaded"))
    code, result, _ = generate(tmp_path)
    assert code == 0 and (result["written"], result["skipped"]) == (0, COUNT)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, generate: Callable) -> None:
    generate(tmp_path / "whole")
    generate(tmp_path / "cut")
    (tmp_path / "cut" / "clip1_2.png").unlink()
    whole = (tmp_path / "cut" / "clip0_0.png").read_bytes()
    (tmp_path / "cut" / "clip0_0.png").write_bytes(whole[:100])
    lines = (tmp_path / "cut" / "generation.jsonl").read_text()
    (tmp_path / "cut" / "generation.jsonl").unlink()
    (tmp_path / "cut" / ".generation-3.jsonl").write_text(lines[:-20])  # of another process, which was killed
    code, result, _ = generate(tmp_path / "cut")
    assert code == 0 and (result["written"], result["skipped"]) == (2, 3)
    assert_same(tmp_path / "whole", tmp_path / "cut", tolerance=0)
    assert (tmp_path / "cut" / "generation.jsonl").read_text() == (tmp_path / "whole" / "generation.jsonl").read_text()
    assert not (tmp_path / "cut" / ".generation-3.jsonl").exists()


def test_another_setting_makes_the_pictures_again(tmp_path: Path, generate: Callable) -> None:
    generate(tmp_path, "--split", "test")
    assert generate(tmp_path, "--split", "test", "--seed", 1)[1]["written"] == 1
    assert generate(tmp_path, "--split", "test", "--seed", 1, "--descriptions", "manifest")[1]["written"] == 1


def test_a_bad_frame_is_reported_and_does_not_stop_the_others(
    rows: list[dict[str, Any]], tmp_path: Path, generate: Callable
) -> None:
    broken = [{**row, "image_0": b"no picture" if i == 1 else row["image_0"]} for i, row in enumerate(rows)]
    write_shard(broken, tmp_path / "manifest" / "a.parquet")
    code, result, err = generate(tmp_path / "out", "--batch-size", 3, manifest=tmp_path / "manifest")
    assert code == 1 and (result["written"], result["failed"]) == (COUNT - 1, 1)
    assert "clip0_1: `image_0` must be an image that can be read" in err


# --- Without a VLM ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("has_vlm", [False, True])
def test_imported_features_need_no_vlm(
    has_vlm: bool,
    rows: list[dict[str, Any]],
    features: Path,
    no_vlm: Path,
    tiny_folder: Path,
    tmp_path: Path,
    generate: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("frame_states", "generate", "embed"):
        monkeypatch.setattr(llava, name, lambda *_, **__: pytest.fail("the VLM was called"))
    model = tiny_folder if has_vlm else no_vlm
    code, _, err = generate(tmp_path / "cached", "--cache", features, "--batch-size", 2, model=model)
    assert code == 0 and "zero" not in err
    assert record_of(tmp_path / "cached" / "clip0_1.png")["description"] == rows[1]["description"]
    generate(tmp_path / "bare", "--descriptions", "manifest", model=no_vlm)
    bare, cached = pictures(tmp_path / "bare"), pictures(tmp_path / "cached")
    assert any((bare[name] != cached[name]).any() for name in bare)


@pytest.mark.filterwarnings("default")
def test_plain_labels_warn_that_the_vlms_parts_are_zero(tmp_path: Path, generate: Callable, no_vlm: Path) -> None:
    code, _, err = generate(tmp_path, model=no_vlm)
    assert code == 0 and "Without a VLM its parts of the condition are zero" in err
    assert record_of(tmp_path / "clip0_1.png")["description"] == ACTIONS[1]


def test_features_that_are_missing_are_named_before_the_model_is_loaded(
    rows: list[dict[str, Any]],
    features: Path,
    tmp_path: Path,
    generate: Callable,
    no_vlm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = [{**row, "description": "Another."} if i in (1, 3) else row for i, row in enumerate(rows)]
    write_shard(other, tmp_path / "manifest" / "a.parquet")
    monkeypatch.setattr(Generate, "load", lambda self, **_: pytest.fail("the model was loaded"))
    code, result, _ = generate(tmp_path / "out", "--cache", features, model=no_vlm, manifest=tmp_path / "manifest")
    assert code == 2 and "lacks those of 2 rows (clip0_1, clip1_3)" in result["error"]
    assert not (tmp_path / "out").exists()


# --- As in the paper -------------------------------------------------------------------------------------------------


def tree(folder: Path) -> Path:
    [run] = folder.iterdir()
    return run


def test_the_paper_gives_the_released_tree(tmp_path: Path, generate: Callable, no_vlm: Path, features: Path) -> None:
    code, result, _ = generate(tmp_path, "--parity", "paper", "--cache", features, model=no_vlm)
    assert code == 0 and result["written"] == COUNT
    assert tree(tmp_path).name == "ldm-e=0-s=2-si=1.5"
    assert set(pictures(tree(tmp_path))) == {f"images/clip{i // 2}/{i}/frame_{i:08d}.jpg" for i in range(COUNT)}
    with PIL.Image.open(tree(tmp_path) / "images" / "clip0" / "1" / "frame_00000001.jpg") as picture:
        assert picture.size == (43, 32)  # the aspect of the clip, whatever the frame's own is
        assert picture.layer[0][1:3] == (2, 2)  # 4:2:0
        other = io.BytesIO()
        picture.save(other, "JPEG", quality=75)
        assert picture.quantization == PIL.Image.open(other).quantization


def test_pictures_of_the_paper_are_what_its_steps_by_hand_give(
    rows: list[dict[str, Any]],
    tmp_path: Path,
    generate: Callable,
    no_vlm: Path,
    features: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "CHUNKS", 2)
    generate(tmp_path, "--parity", "paper", "--cache", features, "--batch-size", 2, "--seed", 3, model=no_vlm)
    pipeline = LegoPipeline.from_pretrained(no_vlm)
    pipeline.set_progress_bar_config(disable=True)
    from lego_pipeline.scheduler import LegoEulerAncestralScheduler

    pipeline.scheduler = LegoEulerAncestralScheduler()
    cache = EmbeddingCache(features)
    stream = torch.Generator().manual_seed(3)  # of the second chunk, rows 2 to 4
    for number in (2, 3):
        row = rows[number]
        frame = PIL.Image.open(io.BytesIO(row["image_0"]))
        squeezed = frame.resize((32, 32), PIL.Image.Resampling.LANCZOS)
        latents = pipeline(
            squeezed,
            enhancement=cache.lookup(frame, row["action"], description=row["description"]),
            num_inference_steps=2,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            generator=stream,
            output_type="latent",
        ).images
        with torch.no_grad():
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
        expected = parity.released_picture(decoded, 1440, 1080)
        found = pictures(tmp_path)[f"ldm-e=3-s=2-si=1.5/images/clip1/{number}/frame_{number:08d}.jpg"]
        again = np.asarray(PIL.Image.open(io.BytesIO(parity.released_jpeg(expected)))).astype(int)
        assert np.abs(found - again).max() <= 2


@pytest.mark.parametrize("argv", [(), ("--descriptions", "generate")])
def test_the_papers_pictures_do_not_depend_on_the_batch_nor_on_a_break(
    argv: tuple[str, ...], tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "CHUNKS", 2)
    generate(tmp_path / "one", "--parity", "paper", *argv)
    generate(tmp_path / "three", "--parity", "paper", "--batch-size", 3, *argv)
    # One level before the contrast is stretched and the picture compressed.
    assert_same(tmp_path / "one", tmp_path / "three", tolerance=3)
    files = sorted((tmp_path / "three").rglob("*.jpg"))
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-9])
    code, result, _ = generate(tmp_path / "three", "--parity", "paper", *argv)
    assert code == 0 and (result["written"], result["skipped"]) == (2, 3)
    assert_same(tmp_path / "one", tmp_path / "three", tolerance=3)


def test_the_papers_settings_are_the_releases_unless_given(
    tmp_path: Path, data: Path, no_vlm: Path, features: Path
) -> None:
    flags = ["--model", no_vlm, "--data", data, "--cache", features, "--output", tmp_path]
    flags += ["--split", "test", "--parity", "paper"]
    assert main(["generate", *map(str, flags)]) == 0
    [record] = [json.loads(line) for line in (tree(tmp_path) / "generation.jsonl").read_text().splitlines()]
    assert tree(tmp_path).name == "ldm-e=0-s=100-si=1.5"
    assert (record["steps"], record["guidance_scale"], record["image_guidance_scale"]) == (100, 7.5, 1.5)
    assert record["sha256"] == hashlib.sha256((tmp_path / record["path"]).read_bytes()).hexdigest()


def test_the_tree_is_named_after_the_model_however_its_folder_is_given(
    tmp_path: Path, generate: Callable, no_vlm: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(no_vlm)
    flags = ("--parity", "paper", "--cache", features, "--split", "test")
    assert generate(tmp_path, *flags, model=Path())[0] == 0
    assert tree(tmp_path).name == "ldm-e=0-s=2-si=1.5"


# --- Refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "an image beside it": (["--image", "a.png"], "`--image` must be left out with `--data`"),
    "an action beside it": (["--action", "open"], "`--action` must be left out with `--data`"),
    "a file": (["--output", "out.png"], "`--output` must be a folder"),
    "an unknown split": (["--split", "other"], "`split` must be a split"),
    "fast in the paper": (["--parity", "paper", "--fast"], "`--fast` must be left out"),
    "no descriptions of the features": (["--cache", "features", "--descriptions", "generate"], "must be manifest"),
    "no manifest": (["--data", "nowhere"], "nowhere"),
    "no sizes of the clips": (["--data", "plain", "--parity", "paper"], "frame_path, clip_width, clip_height"),
    "no descriptions": (["--data", "plain", "--descriptions", "manifest"], "got plain, of which 1 row (a)"),
    "a picture twice": (["--data", "twice", "--parity", "paper"], "got 2 rows (a, b) with that of another"),
    "frames that would be replaced": (["--data", "files", "--output", "files"], "must not replace files/b.png"),
    "an id outside": (["--data", "outside"], "got 1 row (../a) elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_says_why_in_one_line_and_writes_no_file(
    case: str,
    data: Path,
    rows: list[dict[str, Any]],
    features: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(features, "features")
    row = {"image_0": rows[0]["image_0"], "action": "open"}
    write_shard([{"id": "a", **row}], tmp_path / "plain" / "a.parquet")
    write_shard([{"id": "../a", **row}], tmp_path / "outside" / "a.parquet")
    released = {name: rows[0][name] for name in ("frame_path", "clip_width", "clip_height", "description")}
    write_shard([{"id": name, **row, **released} for name in "ab"], tmp_path / "twice" / "a.parquet")
    Path("files").mkdir()
    PIL.Image.new("RGB", (32, 32)).save("files/b.png")
    lines = [{"id": name, "image_0_file_name": "b.png", "action": "open"} for name in "ab"]
    Path("files", "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = Path("files", "b.png").read_bytes()
    argv, expected = REFUSED[case]
    flags = [] if "--data" in argv else ["--data", str(data)]
    flags += [] if "--output" in argv else ["--output", "out"]
    assert main(["generate", "--model", str(tiny_folder), *flags, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err
    assert not Path("out").exists() and not Path("out.png").exists()
    assert Path("files", "b.png").read_bytes() == before and not Path("files", "a.png").exists()


def test_flags_of_a_manifest_are_refused_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--image", "a.png", "--action", "b", "--parity", "paper", "--output", str(tmp_path)]) == 2
    assert "`--parity` must go with `--data`" in capsys.readouterr().err


# --- Processes -------------------------------------------------------------------------------------------------------


def command(output: Path, data: Path, model: Path, *flags: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    name = ["-m", "lego_pipeline.cli", "generate", "--model", str(model), "--data", str(data)]
    return [sys.executable, *(launcher if processes > 1 else []), *name, "--output", str(output), *flags]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_two_processes_draw_what_one_does(data: Path, no_vlm: Path, features: Path, tmp_path: Path) -> None:
    for flags in ((), ("--parity", "paper")):
        flags = ("--steps", "2", "--cache", str(features), *flags)
        name = str(len(flags))
        assert main(command(tmp_path / f"{name}-one", data, no_vlm, *flags)[3:]) == 0
        two = command(tmp_path / f"{name}-two", data, no_vlm, *flags, "--batch-size", "2", "--json", processes=2)
        result = subprocess.run(
            two, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads(result.stdout)["written"] == COUNT  # one process prints, for all
        assert_same(tmp_path / f"{name}-one", tmp_path / f"{name}-two", tolerance=3 if "paper" in flags else 1)
        [one], [both] = ((tmp_path / f"{name}-{kind}").rglob("generation.jsonl") for kind in ("one", "two"))
        ids = [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in (one, both)]
        assert ids[0] == ids[1] and len(ids[0]) == COUNT
        assert not list((tmp_path / f"{name}-two").rglob(".generation-*"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--parity", "paper")])
def test_a_run_that_is_killed_goes_on(
    flags: tuple[str, ...], data: Path, no_vlm: Path, features: Path, tmp_path: Path
) -> None:
    flags = ("--steps", "60", "--cache", str(features), *flags)
    whole, cut = (command(tmp_path / name, data, no_vlm, *flags) for name in ("whole", "cut"))
    subprocess.run(whole, env=ENVIRONMENT, cwd=ROOT, check=True)  # as many threads as the others: sums round alike
    process = subprocess.Popen(cut, env=ENVIRONMENT, cwd=ROOT)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and len(pictures(tmp_path / "cut")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(pictures(tmp_path / "cut")) < COUNT
    subprocess.run(cut, env=ENVIRONMENT, cwd=ROOT, check=True)
    assert_same(tmp_path / "whole", tmp_path / "cut", tolerance=0)
