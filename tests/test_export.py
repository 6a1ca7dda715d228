"""Exported folders: whole or absent, with the VLM's files and a card."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from lego_pipeline.enhance import vlm_id
from lego_pipeline.export import find_vlm, model_card, note_vlm, save_trained, whole_folder, with_weights
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.stable_diffusion import widen_input


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "folder") as unfinished:
            (unfinished / f"{text}.txt").write_text(text)
            assert sorted(path.name for path in (tmp_path / "folder").glob("*")) == ["old.txt"] * (text == "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new.txt"]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_leaves_the_old_folder(error: type[Exception], tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "old.txt").touch()

    def fail() -> None:
        with whole_folder(tmp_path / "folder") as unfinished:
            (unfinished / "new.txt").touch()
            raise error("no space left on device")

    with pytest.raises(OSError, match=r"folder could not be written \(no space left on device\); free some space"):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old.txt"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".folder.lego-old").mkdir()
    (tmp_path / ".folder.lego-old" / "old.txt").touch()
    (tmp_path / ".folder.lego-unfinished").mkdir()
    with whole_folder(tmp_path / "folder"):
        assert (tmp_path / "folder" / "old.txt").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_users_folder_beside_it_is_left_alone(tmp_path: Path) -> None:
    for name in ("folder.old", "folder.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    for _ in range(2):
        with whole_folder(tmp_path / "folder"):
            pass
    kept = ["folder", "folder.old", "folder.old/mine.txt", "folder.unfinished", "folder.unfinished/mine.txt"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == kept


def test_trained_weights_go_into_a_folder_with_the_vlm_as_it_is(
    tiny_pipeline: LegoPipeline, tiny_folder: Path, tmp_path: Path
) -> None:
    unet = {name: tensor + 1 for name, tensor in tiny_pipeline.unet.state_dict().items()}
    projector = tiny_pipeline.projector.state_dict()
    vlm = find_vlm(tiny_folder)
    save_trained(tmp_path / "saved", tiny_pipeline, unet, projector, vlm=vlm, card="a card")
    pipe = LegoPipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, unet[name]) for name, tensor in pipe.unet.state_dict().items())
    assert pipe.config["resolution"] == tiny_pipeline.config["resolution"]
    assert pipe.vlm is not None
    stored = load_file(tiny_folder / "vlm" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "vlm" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())
    assert (tmp_path / "saved" / "README.md").read_text() == "a card"
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index == json.loads((tiny_folder / "model_index.json").read_text())


def test_weights_are_copied_where_links_are_impossible(
    tiny_pipeline: LegoPipeline, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("lego_pipeline.export.os.link", no_links)
    states = tiny_pipeline.unet.state_dict(), tiny_pipeline.projector.state_dict()
    save_trained(tmp_path / "saved", tiny_pipeline, *states, vlm=find_vlm(tiny_folder), card="")
    assert LegoPipeline.from_pretrained(tmp_path / "saved").vlm is not None


def test_a_pipeline_without_a_vlm_has_none(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path) -> None:
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path)
    assert find_vlm(tmp_path) is None


def test_an_adapter_alone_is_no_vlm(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_folder / "vlm" / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"`vlm` must be a whole model .* merge it first"):
        find_vlm(tiny_folder, tmp_path)


def test_a_vlm_without_weights_is_none(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "vlm", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold the weights"):
        find_vlm(tiny_folder, tmp_path)


def test_a_folder_s_vlm_is_noted_as_it_was_saved(
    make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    make_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path)
    noted = note_vlm(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        pipe = LegoPipeline.from_pretrained(tmp_path, dtype=dtype)
        assert pipe.projector.config.vlm_id == noted == vlm_id(pipe.vlm, pipe.vlm_processor)


def test_without_a_vlm_there_is_nothing_to_note(
    make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`folder` must be a LegoPipeline with its VLM"):
        note_vlm(tmp_path)


def test_a_copy_has_the_size_of_an_input_layer_that_was_widened(tiny_pipeline: LegoPipeline) -> None:
    config = {key: value for key, value in tiny_pipeline.unet.config.items() if not key.startswith("_")}
    config["out_channels"] = config.pop("in_channels") - 8  # the file leaves it out, its default is 4
    unet: Any = UNet2DConditionModel.from_config(config)
    widen_input(unet, 8)
    copy = with_weights(unet, unet.state_dict())
    assert copy.conv_in.in_channels == copy.config["in_channels"] == 8
    assert copy.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()  # in the same memory


def test_a_card_has_front_matter_for_the_hub_and_leaves_the_licence_open() -> None:
    card = model_card("Title", base_model="start", facts={"steps": 3}, settings="seed: 0\n")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "image-to-image"
    assert front["base_model"] == "start"
    assert "license" not in front
    assert "| steps | 3 |" in card
    assert "seed: 0" in card
