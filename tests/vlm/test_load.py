"""VLM, processor and adapter from folders that lack something: each error names the argument and what to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from lego_pipeline.vlm.load import load_adapter, load_processor, load_vlm


@pytest.fixture
def folder(tiny_components: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny LLaVA with its processor."""
    for name in ("vlm", "vlm_processor"):
        tiny_components[name].save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_a_whole_folder_loads(folder: Path) -> None:
    assert load_vlm(str(folder)).config.model_type == "llava"
    assert load_processor(str(folder)).tokenizer is not None


def test_weights_that_are_cut_off_are_named(folder: Path) -> None:
    cut(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors` must have \d+ bytes by its header"):
        load_vlm(str(folder))


def test_weights_that_are_missing_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="llava` must hold the weights"):
        load_vlm(str(folder))


def test_a_tokenizer_alone_is_no_processor(tiny_components: dict[str, Any], tmp_path: Path) -> None:
    tiny_components["vlm_processor"].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`vlm` must be a folder with a VLM and its processor"):
        load_processor(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="must hold `config.json`"):
        load_vlm(str(tmp_path))


def test_a_model_without_images_is_no_vlm(tiny_components: dict[str, Any], tmp_path: Path) -> None:
    tiny_components["text_encoder"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`vlm` must be a folder with a VLM and its processor"):
        load_vlm(str(tmp_path))


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny LLaVA."""
    vlm = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(vlm, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_cut_off_is_named(folder: Path, adapter: Path) -> None:
    assert load_adapter(load_vlm(str(folder)), adapter).active_adapter == "default"
    cut(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors` must have \d+ bytes"):
        load_adapter(load_vlm(str(folder)), adapter)


def test_an_adapter_of_another_model_is_named(tiny_qwen_vlm: tuple[Any, Any], adapter: Path, tmp_path: Path) -> None:
    tiny_qwen_vlm[0].save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match="`adapter` must be one of the VLM it is given for, got .*adapter"):
        load_adapter(load_vlm(str(tmp_path / "qwen")), adapter)


def test_a_folder_without_an_adapter_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`adapter` must be a folder that peft saved, found no adapter_config"):
        load_adapter(load_vlm(str(folder)), folder)


def test_a_folder_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    for load in (load_vlm, load_processor):
        with pytest.raises(ValueError, match="`vlm` must be a folder with a VLM and its processor, .* got .*llava"):
            load(str(folder))
