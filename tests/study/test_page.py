"""The study's folder: what raters can see, what stays hidden, and what happens when the command runs again."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.cli import main
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.study import blinding
from lego_pipeline.study.page import Key, html
from lego_pipeline.study.systems import parse_systems
from tests.study.conftest import ACTIONS, SYSTEMS


def study_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "page" / "study.json").read_text())


def pixels(folder: Path, token: str) -> np.ndarray:
    with PIL.Image.open(folder / "page" / "frames" / f"{token}.png") as image:
        return np.array(image)


def test_raters_see_no_names_ids_or_metadata(frames_study: Path) -> None:
    files = [path for path in (frames_study / "page").rglob("*") if path.is_file()]
    assert len(files) == 2 + len(list((frames_study / "page" / "frames").iterdir()))
    for path in files:
        data = path.read_bytes()
        for word in (*SYSTEMS, "pair-", "generation", str(frames_study)):
            assert word.encode() not in data and word not in path.name, (path, word)
    for path in (frames_study / "page" / "frames").iterdir():
        assert re.fullmatch(r"[0-9a-f]{20}\.png", path.name)
        with PIL.Image.open(path) as image:
            assert image.size == (48, 32) and not image.info


def test_every_token_is_the_picture_that_the_key_says(
    frames_study: Path, manifest: Path, outputs: dict[str, Path]
) -> None:
    key, rows = Key.read(frames_study / "key.json"), {row["id"]: row for row in read_manifest(manifest)}
    questions = {question["id"]: question for question in study_of(frames_study)["questions"]}
    assert questions.keys() == key.questions.keys()
    for name, noted in key.questions.items():
        shown = questions[name]
        row = rows[noted["row"]]
        assert shown["action"] == row["action"] and set(shown["choices"]) == set(noted["choices"])
        assert (pixels(frames_study, shown["input"]) == np.array(row["image_0"].convert("RGB"))).all()
        if noted["expected"]:
            [right] = noted["expected"]
            assert (pixels(frames_study, right) == np.array(row["image_1"].convert("RGB"))).all()
            [other] = set(shown["choices"]) - {right}
            targets = [np.array(r["image_1"].convert("RGB")) for r in rows.values() if r["image_1"] and r is not row]
            assert any((pixels(frames_study, other) == target).all() for target in targets)
            continue
        for token, system in noted["choices"].items():
            with PIL.Image.open(outputs[system] / f"{noted['row']}.png") as made:
                own = made.convert("RGB").resize((48, 32), PIL.Image.Resampling.BICUBIC)
            assert (pixels(frames_study, token) == np.array(own)).all()


def test_attention_checks_look_like_the_other_questions(frames_study: Path) -> None:
    key = Key.read(frames_study / "key.json")
    assert sorted(len(question["expected"]) for question in key.questions.values()) == [0] * 6 + [1] * 2
    shapes = {
        tuple(sorted(question)) + (len(question["choices"]),) for question in study_of(frames_study)["questions"]
    }
    assert len(shapes) == 1
    names = [question["id"] for question in study_of(frames_study)["questions"]]
    assert names == sorted(names)


def test_orders_differ_by_rater_and_question_and_can_be_computed_again(frames_study: Path) -> None:
    tokens = [f"{i}" for i in range(5)]
    orders = {
        (rater, question): tuple(blinding.in_order(3, rater, question, tokens))
        for rater in map(str, range(30))
        for question in map(str, range(30))
    }
    assert blinding.in_order(3, "7", "9", tokens[::-1]) == list(orders["7", "9"])
    assert len(set(orders.values())) == 120
    first = [sum(order[0] == token for order in orders.values()) for token in tokens]
    assert min(first) > 140 and max(first) < 220  # 180 expected, 12 is one standard deviation
    assert orders != {key: tuple(blinding.in_order(4, *key, tokens)) for key in orders}


def test_tokens_tell_nothing_without_the_secret() -> None:
    one, other = blinding.new_secret(), blinding.new_secret()
    assert blinding.token(one, "picture", "a") == blinding.token(one, "picture", "a")
    assert len({blinding.token(one, "a"), blinding.token(other, "a"), blinding.token(one, "a", "")}) == 3


def test_the_same_command_leaves_the_study_as_it_is(
    frames_study: Path, manifest: Path, outputs: dict[str, Path]
) -> None:
    before = {path: path.read_bytes() for path in frames_study.rglob("*") if path.is_file()}
    systems = [f"{name}={path}" for name, path in outputs.items()]
    command = ["study", "--data", str(manifest), "--output", str(frames_study), "--attention-checks", "2"]
    (frames_study / "page" / "index.html").unlink()  # as if it had been killed before the end
    assert main([*command, "--seed", "3", "--systems", *systems]) == 0
    assert {path: path.read_bytes() for path in frames_study.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [["--seed", "4"], ["--questions", "3"], ["--title", "Another one"]])
def test_another_study_does_not_replace_one_that_is_there(
    flags: list[str],
    frames_study: Path,
    manifest: Path,
    outputs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in frames_study.rglob("*") if path.is_file()}
    systems = [f"{name}={path}" for name, path in outputs.items()]
    command = ["study", "--data", str(manifest), "--output", str(frames_study), "--attention-checks", "2"]
    assert main([*command, "--seed", "3", *flags, "--systems", *systems]) == 2
    assert "must be a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in frames_study.rglob("*") if path.is_file()} == before


def test_a_picture_that_was_made_anew_does_not_slip_in(
    manifest: Path, outputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(outputs[SYSTEMS[0]], changed)
    command = ["study", "--data", str(manifest), "--output", str(tmp_path / "study"), "--systems"]
    command += [f"a={changed}", f"b={outputs[SYSTEMS[1]]}"]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "study").rglob("*") if path.is_file()}
    shutil.copy(changed / "pair-0.png", changed / "pair-1.png")
    assert main(command) == 2
    assert "not the one that the study" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "study").rglob("*") if path.is_file()} == before


def test_descriptions_are_rated_with_both_frames_and_mixed_systems(
    make_study: Callable[..., Path], manifest: Path
) -> None:
    folder = make_study("--mode", "descriptions", "--attention-checks", "2", "--questions", "4")
    key, questions = Key.read(folder / "key.json"), study_of(folder)["questions"]
    assert len(questions) == 4 * 2 + 2
    for question in questions:
        noted = key.questions[question["id"]]
        assert question["choices"] == ["right", "partly", "wrong", "hallucinated"]
        assert ("target" in question) == (noted["row"] != f"pair-{len(ACTIONS) - 1}")
        if noted["expected"]:
            assert noted["expected"] == ["wrong", "hallucinated"]
            assert noted["verb"] not in question["description"] and noted["noun"] not in question["description"]
        else:
            number = SYSTEMS.index(noted["system"])
            assert question["description"] == f"{noted['verb']} the {noted['noun']}, says number {number}."


def test_without_systems_the_manifests_descriptions_are_rated(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    assert main(["study", "--data", str(manifest), "--output", str(folder), "--mode", "descriptions"]) == 0
    questions = study_of(folder)["questions"]
    assert len(questions) == 6 and any("<b>open</b>" in question["description"] for question in questions)
    text = (folder / "page" / "index.html").read_text()
    assert "<b>open" not in text  # a description is data of the page, never its HTML
    assert Key.read(folder / "key.json").systems == {"manifest": str(manifest)}


def test_a_title_is_text_and_placeholders_in_it_are_left_alone() -> None:
    text = json.dumps({"title": "A {{study}} & <script>"}).replace("<", "\\u003c")
    assert "<title>A {{study}} &amp; &lt;script&gt;</title>" in html(text)


@pytest.mark.filterwarnings("always")
def test_rows_that_a_system_lacks_are_left_out_with_a_warning(
    manifest: Path, outputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for i in (1, 4):
        shutil.copy(outputs[SYSTEMS[0]] / f"pair-{i}.png", part)
    command = ["study", "--data", str(manifest), "--output", str(tmp_path / "study")]
    systems = ["--systems", f"part={part}", f"whole={outputs[SYSTEMS[1]]}"]
    assert main([*command, *systems]) == 0
    assert "4 of 6 rows are left out: part lacks 4." in capsys.readouterr().err
    assert {q["row"] for q in Key.read(tmp_path / "study" / "key.json").questions.values()} == {"pair-1", "pair-4"}
    assert main([*command, *systems, "--questions", "3"]) == 2
    assert "2 of 6 (part lacks 4), got 3" in capsys.readouterr().err


def test_pictures_of_the_released_layout_and_of_other_kinds_of_files_are_found(
    make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
) -> None:
    rows = [
        {"id": f"clip_{i}", "image_0": make_frame(24, 24, i), "action": "open", "frame_path": f"data/clip/{i}/f.jpg"}
        for i in range(2)
    ]
    write_shard(rows, tmp_path / "data" / "test.parquet")
    tree, plain = tmp_path / "released" / "name-s=0" / "images", tmp_path / "plain"
    plain.mkdir()
    for i in range(2):
        (tree / "clip" / str(i)).mkdir(parents=True)
        make_frame(24, 24, 10 + i).save(tree / "clip" / str(i) / "f.jpg")
        make_frame(24, 24, 20 + i).save(plain / f"clip_{i}.webp")
    command = ["study", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "study"), "--systems"]
    assert main([*command, f"released={tmp_path / 'released'}", f"plain={plain}"]) == 0
    assert len(study_of(tmp_path / "study")["questions"]) == 2


def test_pictures_that_were_made_for_another_action_are_refused(
    manifest: Path, outputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(outputs[SYSTEMS[0]], other)
    record = {"id": "pair-2", "action": "open window"}
    (other / "generation.jsonl").write_text(json.dumps(record) + "\n")
    command = ["study", "--data", str(manifest), "--output", str(tmp_path / "study"), "--systems", f"a={other}"]
    assert main([*command, f"b={outputs[SYSTEMS[1]]}"]) == 2
    assert "`--systems` must hold pictures of the manifest's own" in (error := capsys.readouterr().err)
    assert "a made 1 row (pair-2) from others" in error and not (tmp_path / "study").exists()


def test_the_times_of_files_do_not_tell_the_systems(frames_study: Path) -> None:
    paths = sorted((frames_study / "page" / "frames").iterdir())
    assert sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)) == paths


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lego"], "must be NAME=DIR"),
        (["=."], "must be NAME=DIR"),
        (["a=.", "a=."], "different names"),
        (["a=nowhere"], "nothing at nowhere"),
        ([f"{i}=." for i in range(10)], "at most 9"),
    ],
)
def test_systems_that_can_not_be_meant_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_systems(texts)


def test_a_key_that_was_changed_is_refused(frames_study: Path, tmp_path: Path) -> None:
    content = json.loads((frames_study / "key.json").read_text())
    question = next(q for q in content["questions"].values() if not q["expected"])
    question["choices"] = dict(zip(question["choices"], reversed(question["choices"].values()), strict=True))
    changed = tmp_path / "key.json"
    changed.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its seal does not fit"):
        Key.read(changed)
    for text in ("{", "[]", "{}", '{"seal": 1}'):
        changed.write_text(text)
        with pytest.raises(ValueError, match="`key` must be the key.json"):
            Key.read(changed)
