"""Saving and loading: both ways, dtypes, variants, shards, and folders that are broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from lego_pipeline import loading
from lego_pipeline.pipeline_lego import LegoPipeline

ACTION = "open drawer"


def run(pipe: LegoPipeline, frame: PIL.Image.Image) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(frame, ACTION, generator=torch.Generator().manual_seed(0), output_type="np").images


def assert_same_frame(loaded: LegoPipeline, built: LegoPipeline, frame: PIL.Image.Image) -> None:
    """Equal up to rounding: weights read from a file lie at other addresses, where kernels add in another order."""
    np.testing.assert_allclose(run(loaded, frame), run(built, frame), atol=1e-5)


def dtypes(pipe: LegoPipeline) -> set[torch.dtype]:
    return {value.dtype for value in pipe.components.values() if isinstance(value, torch.nn.Module)}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny pipeline that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def half_folder(make_tiny_pipeline, tmp_path_factory) -> Path:
    """A tiny pipeline whose weights are stored in float16."""
    folder = tmp_path_factory.mktemp("half") / "checkpoint"
    make_tiny_pipeline().to(torch.float16).save_pretrained(folder)
    return folder


# --- Round trip ---------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_every_weight_to_the_bit(tiny_pipeline, tiny_folder):
    loaded = LegoPipeline.from_pretrained(tiny_folder)
    for name, component in tiny_pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            before, after = component.state_dict(), getattr(loaded, name).state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_second_round_trip_gives_the_same_frame_to_the_bit(tiny_folder, frame, tmp_path):
    first = LegoPipeline.from_pretrained(tiny_folder)
    first.save_pretrained(tmp_path)
    assert np.array_equal(run(LegoPipeline.from_pretrained(tmp_path), frame), run(first, frame))


def test_the_settings_of_the_pipeline_survive(make_tiny_pipeline, tmp_path):
    statistics = {"directions": [[0.1] * 32], "mean": [0.5], "scale": [1.0], "limit": 4.0}
    settings = {"guidance_interval": (0.25, 0.75), "frame_statistics": statistics, "question_template": "How {}?"}
    make_tiny_pipeline(**settings, vlm_dropout=True).save_pretrained(tmp_path)
    config = LegoPipeline.from_pretrained(tmp_path).config
    assert config.guidance_interval == [0.25, 0.75] and config.frame_statistics == statistics
    assert config.question_template == "How {}?" and config.vlm_dropout and config.resolution == 32


def test_a_pipeline_without_a_vlm_is_saved_and_loaded(make_tiny_pipeline, frame, tmp_path):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None, vlm_dropout=True)
    pipe.save_pretrained(tmp_path)
    loaded = LegoPipeline.from_pretrained(tmp_path)
    assert loaded.vlm is None
    assert_same_frame(loaded, pipe, frame)


def test_the_vlm_may_be_left_out_when_loading(tiny_folder):
    pipe = LegoPipeline.from_pretrained(tiny_folder, vlm=None, vlm_processor=None)
    assert pipe.vlm is None and pipe.vlm_processor is None


def test_saving_writes_the_loader_of_one_line(tiny_folder):
    lines = (tiny_folder / "lego.py").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("from lego_pipeline import LegoPipeline")


def test_the_index_names_the_class_by_a_plain_string(tiny_folder):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["_class_name"] == "LegoPipeline"
    assert index["projector"] == ["lego_pipeline.projector", "LegoProjector"]


# --- Through DiffusionPipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", ["1", None])
def test_a_process_that_imported_nothing_loads_it_by_custom_pipeline(half_folder, tmp_path, offline):
    script = (
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        "assert 'lego_pipeline' not in sys.modules\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(half_folder)!r}, custom_pipeline='lego',"
        " trust_remote_code=True)\n"
        "print(type(pipe).__module__, {str(c.dtype) for c in pipe.components.values() if hasattr(c, 'dtype')})\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment["HF_HOME"] = str(tmp_path / "hub")
    if offline:
        environment["HF_HUB_OFFLINE"] = offline
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "lego_pipeline.pipeline_lego {'torch.float32'}"


def test_both_ways_of_loading_give_the_same_frame(tiny_folder, frame):
    ours = LegoPipeline.from_pretrained(tiny_folder)
    theirs = DiffusionPipeline.from_pretrained(tiny_folder, custom_pipeline="lego", trust_remote_code=True)
    assert type(theirs) is LegoPipeline
    assert np.array_equal(run(ours, frame), run(theirs, frame))


# --- Types, variants, shards --------------------------------------------------------------------------------------


def test_without_a_dtype_everything_is_float32_whatever_the_files_hold(half_folder):
    assert dtypes(LegoPipeline.from_pretrained(half_folder)) == {torch.float32}


def test_without_a_dtype_a_config_that_says_float16_does_not_matter(half_folder, tmp_path):
    folder = Path(shutil.copytree(half_folder, tmp_path / "other"))
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16"}))
    assert dtypes(LegoPipeline.from_pretrained(folder)) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_given_to_every_component(tiny_folder, dtype):
    assert dtypes(LegoPipeline.from_pretrained(tiny_folder, dtype=dtype)) == {torch.bfloat16}


def test_a_dict_gives_each_component_its_dtype(tiny_folder):
    pipe = LegoPipeline.from_pretrained(tiny_folder, dtype={"vlm": "bfloat16", "default": torch.float64})
    assert pipe.vlm.dtype == torch.bfloat16
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float64


def test_components_of_different_dtypes_work_together(tiny_folder, frame):
    pipe = LegoPipeline.from_pretrained(tiny_folder, dtype={"vlm": torch.bfloat16, "text_encoder": torch.float64})
    assert np.isfinite(run(pipe, frame)).all()


@pytest.mark.parametrize("dtype", ["float99", "int64", torch.int8, 16])
def test_an_unknown_dtype_is_refused_with_the_known_ones(tiny_folder, dtype):
    with pytest.raises(ValueError, match='`dtype` must be a floating point .*"float16"'):
        LegoPipeline.from_pretrained(tiny_folder, dtype=dtype)


def test_a_variant_is_written_and_read(make_tiny_pipeline, frame, tmp_path):
    pipe = make_tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_same_frame(LegoPipeline.from_pretrained(tmp_path, variant="fp16"), pipe, frame)


def test_a_folder_with_another_variant_only_says_so(make_tiny_pipeline, tmp_path):
    make_tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"found .*fp16\.safetensors; pass the `variant`"):
        LegoPipeline.from_pretrained(tmp_path)


def test_shards_are_written_and_read(make_tiny_pipeline, frame, tmp_path):
    pipe = make_tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same_frame(LegoPipeline.from_pretrained(tmp_path), pipe, frame)


def test_the_hub_gets_the_files_that_the_folder_has(make_tiny_pipeline, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(LegoPipeline, "push_to_hub", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    options = {"variant": "fp16", "safe_serialization": True}
    hub = {"private": True, "commit_message": "Trained longer"}
    make_tiny_pipeline().save_pretrained(
        tmp_path / "mine", **options, max_shard_size="20KB", push_to_hub=True, repo_id="owner/mine", **hub
    )
    assert calls == [(("owner/mine",), options | hub)]
    assert (tmp_path / "mine" / "lego.py").is_file()


def test_a_device_map_places_the_components(tiny_folder, frame, tiny_pipeline):
    pipe = LegoPipeline.from_pretrained(tiny_folder, device_map="cpu")
    assert_same_frame(pipe, tiny_pipeline, frame)


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_an_unknown_device_is_refused_with_a_known_one(tiny_pipeline, device):
    with pytest.raises(ValueError, match='`device` must be .*"cpu"'):
        tiny_pipeline.to(device)


# --- Broken folders -----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere` must be the folder of a LegoPipeline, got no folder"):
        LegoPipeline.from_pretrained(tmp_path / "nowhere")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="got a folder without `model_index.json`"):
        LegoPipeline.from_pretrained(tmp_path)


def test_a_folder_of_another_pipeline_is_answered_with_the_way_to_go(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInstructPix2PixPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got StableDiffusionInstructPix2PixPipeline; .*from_pipe"):
        LegoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "vlm", "projector"])
def test_missing_weights_are_named(folder, name):
    next((folder / name).glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}` must hold the weights"):
        LegoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "unet", "vlm_processor"])
def test_a_missing_component_is_named(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=rf"{name}` must hold"):
        LegoPipeline.from_pretrained(folder)


def test_a_component_that_is_passed_need_not_be_in_the_folder(folder, tiny_components):
    shutil.rmtree(folder / "unet")
    assert LegoPipeline.from_pretrained(folder, unet=tiny_components["unet"]).unet is tiny_components["unet"]


def test_a_missing_shard_is_named(make_tiny_pipeline, tmp_path):
    make_tiny_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}` must be there"):
        LegoPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "must have .* bytes by its header"),
        (lambda content: content + b"rest", "must have .* bytes by its header"),
        (lambda content: content[:40], "must be a complete safetensors file"),
        (lambda content: b"", "must be a complete safetensors file"),
        (lambda content: b"<html>not found</html>", "must be a complete safetensors file"),
        (lambda content: content[:8] + b"x" + content[9:], "must have a safetensors header"),
    ],
)
def test_damaged_weights_are_named(folder, change, message):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"unet/diffusion_pytorch_model\.safetensors` {message}"):
        LegoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_config_is_named(folder, content):
    (folder / "unet" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"unet/config\.json` must"):
        LegoPipeline.from_pretrained(folder)


def test_a_name_that_is_neither_folder_nor_on_the_hub_says_so():
    with pytest.raises(FileNotFoundError, match="`nobody/nothing` must be a folder here or a repository"):
        LegoPipeline.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_whole_folder_passes_the_check(tiny_folder):
    loading.check_folder(tiny_folder)


def test_a_saved_tokenizer_has_the_files_of_the_older_layout_too(tiny_folder, tiny_components):
    vocab = json.loads((tiny_folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert vocab == tiny_components["tokenizer"].get_vocab()
    assert (tiny_folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").startswith("#version")


def test_a_saved_folder_does_not_tell_where_it_came_from(tiny_folder, tmp_path):
    LegoPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8")
