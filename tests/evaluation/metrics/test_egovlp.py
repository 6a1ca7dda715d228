"""EgoVLP's towers: arrays that the released code made, golden arrays of our own, and files in the release's layout."""

import os
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from lego_pipeline.evaluation import egovlp
from lego_pipeline.evaluation.metrics import preprocess
from tests.golden.make_golden import FOLDER, egovlp_arrays

REFERENCE = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference"), "metrics")
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason=f"no metrics in {REFERENCE.parent}; set LEGO_REFERENCE_DIR"
)


@needs_reference
def test_parity_with_the_released_tower(tmp_path):
    """Tower feature and projection of the released code at tiny size, in float32."""
    state = load_file(REFERENCE / "tiny_egovlp_video_tower.safetensors")
    inner = {name if name.startswith("vid_proj") else f"video_model.{name}": value for name, value in state.items()}
    save_file({f"module.{name}": value for name, value in inner.items()}, tmp_path / "egovlp.safetensors")
    tower = egovlp.load_video_tower(tmp_path / "egovlp.safetensors", num_heads=4)
    with np.load(REFERENCE / "egovlp_and_preprocessing.npz") as arrays, torch.no_grad():
        frames = torch.from_numpy(arrays["frames"])
        np.testing.assert_allclose(tower.video_model(frames), arrays["tower_feature"], atol=2e-6)
        projected = tower(frames)
        np.testing.assert_allclose(projected, arrays["projected"], atol=2e-6)
        normal = torch.nn.functional.normalize(projected, dim=1)
        np.testing.assert_allclose(normal @ normal.T, arrays["cosine_matrix"], atol=1e-6)


@needs_reference
@pytest.mark.parametrize(
    ("name", "view", "statistics"),
    [
        ("egovlp", preprocess.centre_without_antialiasing, preprocess.IMAGENET),
        ("clip", preprocess.squeezed_without_antialiasing, preprocess.CLIP),
    ],
)
def test_parity_with_the_released_preprocessing(name, view, statistics):
    with np.load(REFERENCE / "egovlp_and_preprocessing.npz") as arrays:
        picture = preprocess.unit_tensor(PIL.Image.fromarray(arrays["image_uint8"]))
        seen = preprocess.normalised(view(picture, 224), statistics)[0]
        np.testing.assert_allclose(seen[:, 96:128, 96:128], arrays[f"{name}_input_patch"], atol=1e-5)
        np.testing.assert_allclose(seen.mean((1, 2)), arrays[f"{name}_input_mean"], atol=1e-5)
        np.testing.assert_allclose(seen.std((1, 2)), arrays[f"{name}_input_std"], atol=1e-5)


def test_the_towers_numbers_have_not_changed():
    with np.load(FOLDER / "egovlp.npz", allow_pickle=False) as stored:
        made = egovlp_arrays(
            {name.removeprefix("weights."): stored[name] for name in stored.files if "weights." in name}
        )
        for name in ("features", "time", "view", "whole"):
            np.testing.assert_allclose(made[name], stored[name], atol=1e-5, err_msg=name)


def test_time_attention_groups_places_and_space_attention_frames():
    torch.manual_seed(0)
    block = egovlp.SpaceTimeBlock(16, 2, 8)
    tokens = torch.randn(1, 1 + 3 * 4, 16)  # 3 frames of 4 places

    def changed(over, changed_token, seen_token):
        other = tokens.clone()
        other[0, changed_token] += 1
        with torch.no_grad():
            before, after = (egovlp.divided_attention(block.attn, x, 3, over)[0, seen_token] for x in (tokens, other))
        return not torch.allclose(before, after, atol=1e-6)

    first_of_frame_0, second_of_frame_0, first_of_frame_2 = 1, 2, 1 + 2 * 4
    assert changed("time", first_of_frame_0, first_of_frame_2) and not changed(
        "time", first_of_frame_0, second_of_frame_0
    )
    assert changed("space", first_of_frame_0, second_of_frame_0)
    assert not changed("space", first_of_frame_0, first_of_frame_2)
    for over in ("time", "space"):
        assert changed(over, 0, first_of_frame_2) and changed(over, first_of_frame_2, 0)  # the class token and back


def test_the_released_layout_is_read_without_its_foreign_classes(weights_folder):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(weights_folder / "egovlp.pth", weights_only=True)
    tower = egovlp.load_video_tower(weights_folder / "egovlp.pth")
    assert tower.video_model.num_frames == 4 and tower.video_model.temporal_embed.shape == (1, 4, 64)
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("name", "asked", "count"),
    [("egovlp", None, 4), ("epic_mir_plus", None, 16), ("own", None, 3), ("own", 2, 2), ("egovlp", 6, 6)],
)
def test_the_temporal_code_is_cut_or_extended_by_zeros(name, asked, count, weights_folder, tmp_path):
    state = torch.load(weights_folder / "egovlp.pth", weights_only=False)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
    code = egovlp.load_video_tower(tmp_path / f"{name}.pth", asked).video_model.temporal_embed[0]
    whole = state["module.video_model.temporal_embed"][0]  # of three frames
    assert len(code) == count
    assert torch.equal(code[:3], whole[:count]) and not code[3:].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("module.video_model.blocks.1.norm3.bias"), "norm3.bias"),
        (lambda state: state.update({"module.video_model.blocks.0.extra": torch.ones(1)}), "extra"),
        (lambda state: state.pop("module.vid_proj.0.weight"), "no vid_proj.0.weight"),
    ],
)
def test_loading_is_strict(change, said, weights_folder, tmp_path):
    state = torch.load(weights_folder / "egovlp.pth", weights_only=False)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, tmp_path / "egovlp.pth")
    with pytest.raises(ValueError, match="`egovlp` must be a file of EgoVLP's layout") as error:
        egovlp.load_video_tower(tmp_path / "egovlp.pth")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_text_tower_is_first_token_relu_linear(weights_folder):
    tower = egovlp.load_text_tower(weights_folder / "egovlp.pth", str(weights_folder / "distilbert-base-uncased"))
    tokens = tower.tokenizer("open the drawer", return_tensors="pt")
    with torch.no_grad():
        state = tower.text_model(tokens.input_ids).last_hidden_state[:, 0]
        linear = tower.txt_proj[1]
        expected = state.clamp(min=0) @ linear.weight.T + linear.bias
        torch.testing.assert_close(tower(["open the drawer"]), expected)
        both = tower(["open the drawer", "a person is about to turn on the tap with the left hand"])
        torch.testing.assert_close(both[:1], expected, atol=1e-5, rtol=0)
        assert tower(["hand " * 700]).shape == (1, 16)  # cut at what DistilBERT can read


def test_a_folder_that_is_no_distilbert_is_refused(weights_folder, tmp_path):
    for folder in (tmp_path, weights_folder / "clip-vit-large-patch14"):
        with pytest.raises(ValueError, match="`distilbert` must be"):
            egovlp.load_text_tower(weights_folder / "egovlp.pth", str(folder))
