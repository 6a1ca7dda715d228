"""`lego generate` on the tiny pipeline: single pictures, folders, actions files, resuming and refusals."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from lego_pipeline.cli import main
from lego_pipeline.cli.generate import Generate
from lego_pipeline.cli.records import PNG_KEY
from lego_pipeline.vlm import llava


@pytest.fixture
def frames(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]) -> Path:
    """A folder of three frames."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for seed, name in enumerate(("cup", "drawer", "tap")):
        make_frame(32, 32, seed).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def generate(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict, str]]:
    """Runs `lego generate --json` on the tiny pipeline: exit code, result, standard error."""

    def run(*argv: object, model: object = tiny_folder) -> tuple[int, dict, str]:
        flags = ["generate", "--model", str(model), "--steps", "1", "--json"]
        code = main([*flags, *map(str, argv)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_no_input_frame_is_replaced_not_even_that_of_another_row(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    lines = [{"image": "cup.png", "action": "take", "id": "tap"}, {"image": "tap.png", "action": "take", "id": "a"}]
    (tmp_path / "actions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, result, _ = generate("--actions-file", tmp_path / "actions.jsonl", "--image", frames, "--output", frames)
    assert code == 2 and "`--output` must not replace the input frame" in result["error"]
    assert written(frames) == ["cup.png", "drawer.png", "tap.png"]


def record_of(path: Path) -> dict:
    with PIL.Image.open(path) as picture:
        return json.loads(picture.info[PNG_KEY])


def test_one_frame_gives_one_picture_with_its_parameters(frames: Path, tmp_path: Path, generate: Callable) -> None:
    output = tmp_path / "new" / "out.png"
    code, result, _ = generate("--image", frames / "cup.png", "--action", "take cup", "--output", output, "--seed", 7)
    assert code == 0 and result["ok"] and result["written"] == 1
    record = record_of(output)
    assert (record["action"], record["seed"], record["steps"], record["guidance_scale"]) == ("take cup", 7, 1, 7.5)
    assert record["description"] == result["samples"][0]["description"]
    assert written(output.parent) == ["out.png"]


def test_without_json_the_description_is_printed(
    frames: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--model",
        str(tiny_folder),
        "--steps",
        "1",
        "--image",
        str(frames / "cup.png"),
        "--description",
        "I take it.",
    ]
    assert main(["generate", *argv, "--output", str(tmp_path / "out.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}: I take it.\n"


def test_a_folder_gives_a_picture_for_each_image_and_a_record(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    code, result, _ = generate("--image", frames, "--action", "take cup", "--output", tmp_path / "out")
    assert code == 0 and result["written"] == 3
    assert written(tmp_path / "out") == ["cup.png", "drawer.png", "generation.jsonl", "tap.png"]
    records = [json.loads(line) for line in (tmp_path / "out" / "generation.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["cup", "drawer", "tap"]
    assert records[0] == record_of(tmp_path / "out" / "cup.png")
    assert len({record["seed"] for record in records}) == 3


def test_image_may_be_repeated(frames: Path, tmp_path: Path, generate: Callable) -> None:
    images = ("--image", frames / "cup.png", "--image", frames / "tap.png")
    assert generate(*images, "--action", "take cup", "--output", tmp_path / "out")[0] == 0
    assert written(tmp_path / "out") == ["cup.png", "generation.jsonl", "tap.png"]


def test_a_picture_depends_neither_on_its_neighbours_nor_on_the_batch_size(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    action = ("--action", "take cup")
    generate("--image", frames, *action, "--output", tmp_path / "three", "--batch-size", 3)
    seed = record_of(tmp_path / "three" / "tap.png")["seed"]
    generate("--image", frames / "tap.png", *action, "--output", tmp_path / "one.png", "--seed", seed)
    one, three = (PIL.Image.open(path).tobytes() for path in (tmp_path / "one.png", tmp_path / "three" / "tap.png"))
    assert max(abs(a - b) for a, b in zip(one, three, strict=True)) <= 1


def test_a_csv_names_images_actions_descriptions_and_seeds(frames: Path, tmp_path: Path, generate: Callable) -> None:
    file = frames / "actions.csv"
    file.write_text("image,action,description,seed\ncup.png,Take Cup!,,5\ncup.png,,I put the cup down.,\n")
    code, result, _ = generate("--actions-file", file, "--output", tmp_path / "out", "--batch-size", 2)
    assert code == 0
    first, second = result["samples"]
    assert (first["id"], first["seed"], second["id"]) == ("cup-take-cup", 5, "cup")
    assert second["description"] == "I put the cup down."


def test_a_jsonl_finds_its_images_in_the_folder_given_by_image(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    file = tmp_path / "actions.jsonl"
    file.write_text('{"id": "a", "image": "cup.png", "action": "take cup"}\n')
    assert generate("--actions-file", file, "--image", frames, "--output", tmp_path / "out")[0] == 0
    assert written(tmp_path / "out") == ["a.png", "generation.jsonl"]


def test_what_is_there_already_is_not_made_again(
    frames: Path, tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--image", frames, "--action", "take cup", "--output", tmp_path / "out")
    generate(*command)
    monkeypatch.setattr(Generate, "load", lambda self: pytest.fail("the model was loaded"))
    code, result, _ = generate(*command)
    assert code == 0 and (result["written"], result["skipped"]) == (0, 3)


def test_an_interrupted_run_goes_on_where_it_stopped(frames: Path, tmp_path: Path, generate: Callable) -> None:
    command = ("--image", frames, "--action", "take cup", "--output", tmp_path / "out")
    generate(*command)
    whole = (tmp_path / "out" / "tap.png").read_bytes()
    (tmp_path / "out" / "tap.png").write_bytes(whole[:100])
    lines = (tmp_path / "out" / "generation.jsonl").read_text()
    (tmp_path / "out" / "generation.jsonl").write_text(lines[:-20])
    code, result, _ = generate(*command)
    assert code == 0 and (result["written"], result["skipped"]) == (1, 2)
    assert (tmp_path / "out" / "tap.png").read_bytes() == whole
    assert (tmp_path / "out" / "generation.jsonl").read_text() == lines


@pytest.mark.parametrize("change", ["setting", "image", "model"])
def test_what_does_not_match_any_more_is_made_again(
    change: str, frames: Path, tmp_path: Path, generate: Callable, make_tiny_pipeline: Callable, make_frame: Callable
) -> None:
    command = ["--image", frames / "cup.png", "--action", "take cup", "--output", tmp_path / "out"]
    options = {}
    generate(*command)
    if change == "setting":
        command += ["--guidance-scale", 3]
    elif change == "image":
        make_frame(32, 32, 9).save(frames / "cup.png")
    else:
        make_tiny_pipeline(top_k=3).save_pretrained(tmp_path / "model")
        options["model"] = tmp_path / "model"
    assert generate(*command, **options)[1]["written"] == 1


def test_one_bad_file_is_reported_and_does_not_stop_the_others(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    (frames / "drawer.png").write_bytes(b"no picture")
    code, result, err = generate(
        "--image", frames, "--action", "take cup", "--output", tmp_path / "out", "--batch-size", 3
    )
    assert code == 1 and not result["ok"] and (result["written"], result["failed"]) == (2, 1)
    assert "drawer" in err and err.count("\n") == 1
    assert written(tmp_path / "out") == ["cup.png", "generation.jsonl", "tap.png"]


def test_bad_rows_of_an_actions_file_are_reported_with_their_line(
    frames: Path, tmp_path: Path, generate: Callable
) -> None:
    file = frames / "actions.jsonl"
    rows = ['{"image": "cup.png", "action": "take cup"}', '{"image": "cup.png"}', "no json",
            '{"image": "none.png", "action": "a"}', '{"image": "cup.png", "action": "b", "seed": -1}',
            '{"image": "cup.png", "action": "c", "id": "../c"}']  # fmt: skip
    file.write_text("\n".join(rows))
    code, result, err = generate("--actions-file", file, "--output", tmp_path / "out")
    assert code == 1 and (result["written"], result["failed"]) == (1, 5)
    for part in ("line 2", "line 3", "none.png", "`seed`", "`id`"):
        assert part in err
    assert written(tmp_path / "out") == ["cup-take-cup.png", "generation.jsonl"]


REFUSED = {
    "no image": (["--action", "a"], "`--image`"),
    "no action": (["--image", "cup.png"], "`--action`"),
    "blank action": (["--image", "cup.png", "--action", " "], "`--action`"),
    "missing image": (["--image", "none.png", "--action", "a"], "none.png"),
    "no picture": (["--image", "text.png", "--action", "a"], "text.png"),
    "several to one file": (["--image", "cup.png", "--image", "tap.png", "--action", "a"], "must be a folder for 2"),
    "steps": (["--image", "cup.png", "--action", "a", "--steps", "0"], "`--steps` must be at least 1, got 0"),
    "scale": (["--image", "cup.png", "--action", "a", "--guidance-scale", "nan"], "`--guidance-scale`"),
    "image scale": (["--image", "cup.png", "--action", "a", "--image-guidance-scale=-1"], "`--image-guidance-scale`"),
    "seed": (["--image", "cup.png", "--action", "a", "--seed=-1"], "`--seed`"),
    "batch size": (["--image", "cup.png", "--action", "a", "--batch-size", "0"], "`--batch-size`"),
    "device": (["--image", "cup.png", "--action", "a", "--device", "toaster"], "toaster"),
    "empty folder": (["--image", "empty", "--action", "a"], "must hold image files"),
    "actions file and action": (["--actions-file", "a.csv", "--action", "a"], "`--actions-file`"),
    "missing actions file": (["--actions-file", "a.csv"], "a.csv"),
    "other actions file": (["--actions-file", "text.png"], ".csv or .jsonl"),
    "actions file without columns": (["--actions-file", "wrong.csv"], "image,action"),
    "empty actions file": (["--actions-file", "none.jsonl"], "at least one row"),
    "binary actions file": (["--actions-file", "binary.csv"], "UTF-8"),
    "cache that is a file": (["--image", "cup.png", "--action", "a", "--cache", "LICENCE"], "`--cache`"),
    "no such folder": (["--image", "cup.png", "--action", "a", "--model", "./nowhere"], "nowhere"),
    "no checkpoint": (["--image", "cup.png", "--action", "a", "--model", "empty"], "model_index.json"),
    "picture in place of the input": (["--image", "cup.png", "--action", "a", "--output", "cup.png"], "input frame"),
    "other format": (["--image", "cup.png", "--action", "a", "--output", "out.jpg"], "must end in .png"),
    "below a file": (["--image", "cup.png", "--action", "a", "--output", "cup.png/out.png"], "is a file"),
    "folder that is a file": (["--image", "cup.png", "--action", "a", "--output", "LICENCE"], "is a file"),
    "folder named as a file": (["--image", "cup.png", "--action", "a", "--output", "folder.png"], "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_says_why_in_one_line_and_writes_no_file(
    case: str, frames: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(frames)
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    for name, content in (("text.png", "text"), ("wrong.csv", "a,b\n1,2\n"), ("none.jsonl", ""), ("LICENCE", "")):
        Path(name).write_text(content)
    Path("binary.csv").write_bytes(b"image,action\n\xff\xfe,a\n")
    before = {path: path.stat().st_mtime_ns for path in frames.rglob("*")}
    argv, expected = REFUSED[case]
    flags = [] if "--output" in argv else ["--output", "out.png"]
    flags += [] if "--model" in argv else ["--model", str(tiny_folder)]
    assert main(["generate", *flags, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lego: ") and captured.err.count("\n") == 1
    assert expected in captured.err
    assert {path: path.stat().st_mtime_ns for path in frames.rglob("*")} == before


def test_a_cache_serves_a_second_seed_and_a_second_run(
    frames: Path, tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--image", frames, "--action", "take cup", "--cache", tmp_path / "cache", "--output")
    code, first, _ = generate(*command, tmp_path / "a", "--batch-size", 2)
    assert code == 0 and first["written"] == 3
    for name in ("frame_states", "generate", "embed"):
        monkeypatch.setattr(llava, name, lambda *_, **__: pytest.fail("the VLM was called"))
    code, second, _ = generate(*command, tmp_path / "b", "--seed", 1)
    assert code == 0 and second["written"] == 3
    described = [[sample["description"] for sample in result["samples"]] for result in (first, second)]
    assert described[0] == described[1]


def test_with_a_cache_a_picture_is_another_one(frames: Path, tmp_path: Path, generate: Callable) -> None:
    command = ("--image", frames / "cup.png", "--action", "take cup", "--output", tmp_path / "out")
    generate(*command)
    assert generate(*command, "--cache", tmp_path / "cache")[1]["written"] == 1
    assert generate(*command, "--cache", tmp_path / "cache")[1]["skipped"] == 1


def test_a_damaged_cache_is_named_before_the_model_is_loaded(
    frames: Path, tmp_path: Path, generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--image", frames, "--action", "take cup", "--cache", tmp_path / "cache", "--output", tmp_path / "out")
    generate(*command)
    [shard, *_] = (tmp_path / "cache").glob("0-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr(Generate, "load", lambda self: pytest.fail("the model was loaded"))
    code, result, err = generate(*command, "--steps", 2)
    assert code == 2 and shard.name in result["error"] and err.count("\n") == 1


def test_two_pictures_with_the_same_id_are_refused(frames: Path, tmp_path: Path, generate: Callable) -> None:
    other = tmp_path / "other"
    other.mkdir()
    os.link(frames / "cup.png", other / "cup.png")
    images = ("--image", frames / "cup.png", "--image", other / "cup.png")
    code, result, _ = generate(*images, "--action", "take cup", "--output", tmp_path / "out")
    assert code == 2 and "cup" in result["error"] and "`id` column" in result["error"]


def test_the_embedded_checkpoint_is_the_default(frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lego_pipeline.checkpoints

    monkeypatch.setattr(lego_pipeline.checkpoints, "KITCHEN", tmp_path / "kitchen")
    options = Generate(output=tmp_path / "out.png")
    with pytest.raises(FileNotFoundError, match="kitchen; install the package again"):
        options.find()
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "kitchen" / "model_index.json").write_text("{}")
    assert options.find() == str(tmp_path / "kitchen")
