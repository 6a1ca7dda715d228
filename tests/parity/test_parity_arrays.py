"""Every array that the released code left behind, against what this package computes from the same inputs.

One test for each array of the folder that `LEGO_REFERENCE_DIR` names. An output is compared with ours; an input is
right if everything that is made from it is. Sizes, scales and numbers of steps are the folder's.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison
import jinja2
import numpy as np
import pytest
import released
import torch

from lego_pipeline.convert.vlm import CHAT_TEMPLATE, IMAGE_TOKEN
from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask
from lego_pipeline.vlm.chat import question_turn

REFERENCE = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference"))


def arrays_of(folder: str) -> list[Any]:
    """(file, array) of a folder's files, for the names of the tests; one without array where there is no folder."""
    found = []
    for path in sorted((REFERENCE / folder).glob("*")):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found += [(path.stem, name) for name in archive.files]
        elif path.suffix == ".png":
            found.append((path.stem, "png"))
        elif path.suffix == ".json" and path.stem in comparison.LIMITS:
            content = json.loads(path.read_text())
            found += [(path.stem, name) for name in content if name != "parameters_in_optimizer"]
    return [pytest.param(file, name, id=f"{file}/{name}") for file, name in found] or [pytest.param(folder, None)]


def problems(file: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Outputs of a file that are too far away."""
    found = {name: comparison.difference(file, name, ours[name], theirs[name]) for name in ours}
    return [f"{name}: {d.relative:.1e} > {d.limit:.1e}" for name, d in found.items() if not d.is_within]


@pytest.mark.parametrize(("file", "array"), arrays_of("parity"))
def test_parity_of_the_ldm(
    file: str, array: str, subfolder: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    subfolder("parity")
    files, ours = request.getfixturevalue("files"), request.getfixturevalue("outputs")(file)
    if array in ours:
        difference = comparison.difference(file, array, ours[array], files[file][array])
        assert difference.is_within, difference
    else:
        assert comparison.limit_of(file, array) is None, f"{file}/{array} isn't computed"
        assert not problems(file, ours, files[file])


@pytest.mark.parametrize(("file", "array"), arrays_of("vllm"))
def test_parity_of_the_vlm(
    file: str, array: str, subfolder: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    subfolder("vllm")
    ours, theirs = request.getfixturevalue("vlm_outputs"), request.getfixturevalue("vlm_features")
    if array in ours:
        difference = comparison.difference(file, array, ours[array], theirs[array])
        assert difference.is_within, difference
    else:
        assert comparison.limit_of(file, array) is None, f"{file}/{array} isn't computed"
        assert not problems(file, ours, theirs)


def test_parity_of_the_set_of_trained_parameters(models: released.Models) -> None:
    known = released.released_parameters(models)
    unet = {id(parameter) for parameter in models.raw_unet.parameters()}
    assert [name for name in known if id(known[name]) in unet] == models.trained
    assert len(known) == len(unet) + len(list(models.pipeline.projector.parameters()))


def test_parity_of_rows_within_the_conversions_bound(
    vlm_outputs: dict[str, torch.Tensor], vlm_features: dict[str, torch.Tensor]
) -> None:
    for name in ("image_feature", "text_feature"):
        largest = max(1.0, float(vlm_features[name].abs().max()))
        assert (vlm_outputs[name] - vlm_features[name]).abs().max() <= 2e-6 * largest


def test_parity_of_the_prompts(subfolder: Callable[[str], Path]) -> None:
    facts = json.loads(subfolder("vllm_prompts.json").read_text())
    question = facts["query_template"].format(facts["action"])
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER."}]}
    assert facts["query_template"] == DEFAULT_QUESTION
    assert ask(DEFAULT_QUESTION, facts["action"]) == question
    assert template.render(messages=[question_turn(question)]) == facts["inference_prompt"]
    trained = template.render(messages=[question_turn(question), answer])
    assert trained == facts["training_conversation_with_answer_ANSWER."]
    assert facts["image_placeholder"] == IMAGE_TOKEN
    assert facts["bos_added_by_tokenizer_once_at_start"] is True
    assert facts["image_token_index_in_ids"] < 0  # as `released_vlm.features` finds the frame's place
