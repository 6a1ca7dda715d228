"""A manifest of small frames, what two systems made of it, and a study of both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from lego_pipeline.cli import main
from lego_pipeline.data.manifest import write_shard
from lego_pipeline.study import blinding, page
from lego_pipeline.study.page import Key

SYSTEMS = ("zebra-model", "quokka-model")  # words that nothing else holds
ACTIONS = [("open", "drawer"), ("take", "cup"), ("close", "tap"), ("cut", "bread"), ("wash", "pan"), ("put", "bowl")]
SECRET = "5eed" * 16  # so that no test depends on luck


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory, make_frame: Callable[..., PIL.Image.Image]) -> Path:
    """Six rows; the last has no true frame."""
    folder = tmp_path_factory.mktemp("manifest")
    rows: list[dict[str, Any]] = [
        {
            "id": f"pair-{i}",
            "image_0": make_frame(48, 32, i),
            "image_1": make_frame(48, 32, 100 + i) if i < len(ACTIONS) - 1 else None,
            "action": f"{verb} {noun}",
            "verb": verb,
            "noun": noun,
            "description": f"The right hand does <b>{verb}</b> to the {noun} & lets go.",
            "split": "test",
        }
        for i, (verb, noun) in enumerate(ACTIONS)
    ]
    write_shard(rows, folder / "test-000000.parquet")
    return folder


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, make_frame: Callable[..., PIL.Image.Image]) -> dict[str, Path]:
    """What the systems made: pictures with their name in the PNG text, the second one's of another size."""
    folders = {}
    for number, name in enumerate(SYSTEMS):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        lines = []
        for i, (verb, noun) in enumerate(ACTIONS):
            text = PngInfo()
            text.add_text("lego", json.dumps({"model": name}))
            size = (48, 32) if number == 0 else (60, 40)
            make_frame(*size, 1000 * (number + 1) + i).save(folder / f"pair-{i}.png", pnginfo=text)
            lines.append(
                {"id": f"pair-{i}", "description": f"{verb} the {noun}, says number {number}.", "model": name}
            )
        (folder / "generation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folders


@pytest.fixture(scope="session")
def make_study(
    manifest: Path, outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_study("--attention-checks", "1")`: the folder of a study of both systems, its secret always the same."""

    def make(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("study") / "study"
        systems = [f"{name}={path}" for name, path in outputs.items()]
        command = ["study", "--data", str(manifest), "--output", str(folder), "--systems", *systems, *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page, "new_secret", lambda: SECRET)
            assert main(command) == 0
        return folder

    return make


@pytest.fixture(scope="session")
def frames_study(make_study: Callable[..., Path]) -> Path:
    """Six questions and two attention checks."""
    return make_study("--attention-checks", "2", "--seed", "3")


def votes_of(key: Key, rater: str, pick: Callable[[str, dict[str, Any], list[str]], str]) -> dict[str, Any]:
    """A votes file as the page writes it.

    Args:
        key: of the study.
        rater: their code.
        pick: the answer to a question, of its id, its entry in the key, and the choices in their order.
    """
    answers = []
    for place, name in enumerate(blinding.in_order(key.seed, rater, "", list(key.questions))):
        question = key.questions[name]
        order = list(question["choices"])
        if key.mode == "frames":
            order = blinding.in_order(key.seed, rater, name, order)
        choice = pick(name, question, order)
        answers.append({"question": name, "order": order, "choice": choice, "ms": 2000 + place, "at": place})
    votes = {"format": blinding.VOTES_FORMAT, "study": key.study, "rater": rater, "answers": answers}
    return {**votes, "digest": blinding.digest(blinding.votes_text(votes))}


def picks(system: str) -> Callable[[str, dict[str, Any], list[str]], str]:
    """A rater who always takes one system's picture (or grade), and answers attention checks right."""

    def pick(name: str, question: dict[str, Any], order: list[str]) -> str:
        if question["expected"]:
            return question["expected"][0]
        return next(choice for choice in order if question["choices"][choice] == system)

    return pick
