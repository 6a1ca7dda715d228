"""A checkpoint in the release's layout becomes a folder that both loaders read; what can't be converted is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from lego_pipeline.cli import main
from lego_pipeline.convert import layout
from lego_pipeline.convert.ldm import Facts, convert_ldm, read_schedule
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.scheduler import LegoEulerAncestralScheduler

FACTS = Facts(unet_heads=4, mixer_heads=4, num_image_tokens=4, resolution=32)
FLAGS = ["--unet-heads", "4", "--mixer-heads", "4", "--image-tokens", "4", "--resolution", "32"]
SIZES = layout.Sizes(
    unet_channels=(32, 64),
    unet_attention=(True, False),
    unet_layers=1,
    unet_depth=1,
    in_channels=8,
    out_channels=4,
    cross_attention_dim=32,
    vae_channels=(32, 32, 32),
    vae_layers=1,
    latent_channels=4,
    vocabulary=600,
    text_width=32,
    text_feed_forward=40,
    text_layers=1,
    text_length=77,
    vlm_dim=32,
    projector_dim=32,
    mixer_layers=2,
    mixer_feed_forward=48,
    timesteps=1000,
)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A checkpoint with random weights, stored in half precision."""
    generator = torch.Generator().manual_seed(0)
    found = {
        name: torch.randn(shape, generator=generator).half() / 10
        for name, shape in layout.expected_shapes(SIZES, with_ema=True).items()
    }
    scheduler = LegoEulerAncestralScheduler()
    found |= {name: torch.zeros(1000) for name in layout.BUFFERS} | {"betas": scheduler.betas}
    found["alphas_cumprod"] = scheduler.alphas_cumprod
    return found | {layout.POSITIONS: torch.arange(77)[None]}


@pytest.fixture(scope="module")
def checkpoint(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "ego4d.ckpt"
    torch.save({"epoch": 1, "global_step": 2, "pytorch-lightning_version": "1.4.2", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local CLIP tokenizer beside a config, as the folder of OpenAI's model has them."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_components["tokenizer"].save_pretrained(folder)
    text = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-4}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("converted") / "lego"
    return folder, convert_ldm(checkpoint, folder, text_encoder=str(tokenizer), facts=FACTS)


def test_both_loaders_read_the_folder_and_draw(converted: tuple[Path, Any], frame: PIL.Image.Image) -> None:
    ours = LegoPipeline.from_pretrained(converted[0])
    theirs = DiffusionPipeline.from_pretrained(converted[0], custom_pipeline="lego", trust_remote_code=True)
    pictures = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        pipe.register_to_config(vlm_dropout=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe(frame, "open", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*pictures)
    assert (ours.config["resolution"], ours.config["guidance_scale"], ours.config["num_inference_steps"]) == (
        32,
        7.5,
        100,
    )
    assert type(ours.scheduler) is LegoEulerAncestralScheduler


def test_the_averaged_weights_are_taken_unless_asked_otherwise(
    converted: tuple[Path, Any], checkpoint: Path, tokenizer: Path, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert_ldm(checkpoint, tmp_path / "raw", text_encoder=str(tokenizer), weights="raw", facts=FACTS)
    name = f"{layout.UNET}out.2.weight"
    for folder, source in ((converted[0], layout.ema_name(name)), (tmp_path / "raw", name)):
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(weights["conv_out.weight"], state[source].float())


def test_settings_come_from_the_weights_and_the_text_encoders_folder(converted: tuple[Path, Any]) -> None:
    pipe = LegoPipeline.from_pretrained(converted[0])
    text = pipe.text_encoder.config
    assert (text.num_attention_heads, text.hidden_act, text.layer_norm_eps) == (2, "gelu", 1e-4)
    assert (text.vocab_size, text.intermediate_size) == (600, 40)
    assert pipe.unet.config["attention_head_dim"] == 4
    assert pipe.projector.config["vlm_dim"] == 32
    assert pipe.vae_scale_factor == 4
    assert pipe.tokenizer.model_max_length == 77


def test_the_report_tells_what_was_found(converted: tuple[Path, Any], state: dict[str, torch.Tensor]) -> None:
    folder, report = converted
    assert report.projections == "trained"
    assert report.parameters["projector"] == sum(
        t.numel() for n, t in state.items() if n.startswith(tuple(layout.PROJECTIONS))
    )
    card = (folder / "README.md").read_text()
    assert report.projections_reason in card
    assert "library_name: diffusers" in card
    assert str(folder) not in card


def test_weights_are_saved_in_the_asked_dtype(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    convert_ldm(checkpoint, tmp_path / "half", text_encoder=str(tokenizer), facts=FACTS, dtype=torch.float16)
    for file in (tmp_path / "half").glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert LegoPipeline.from_pretrained(tmp_path / "half").dtype == torch.float32


def test_no_averaged_weights_are_an_error(state: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in state.items() if not name.startswith(layout.EMA)}
    save_file(without, tmp_path / "raw.safetensors")
    arguments = {"text_encoder": str(tokenizer), "facts": FACTS}
    with pytest.raises(ValueError, match="`weights` must be 'raw' for .* which holds no averaged weights"):
        convert_ldm(tmp_path / "raw.safetensors", tmp_path / "lego", **arguments)
    assert not (tmp_path / "lego").exists()
    convert_ldm(tmp_path / "raw.safetensors", tmp_path / "lego", weights="raw", **arguments)
    assert (tmp_path / "lego" / "model_index.json").is_file()


def test_some_averaged_weights_missing_are_an_error(
    state: dict[str, torch.Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    gone = [name for name in state if name.startswith(layout.EMA)][3]
    save_file({name: t for name, t in state.items() if name != gone}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"1 missing: {gone}"):
        convert_ldm(tmp_path / "x.safetensors", tmp_path / "lego", text_encoder=str(tokenizer), facts=FACTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet_heads": 7}, "`unet_heads` must divide the widths 32, 64, got 7"),
        ({"mixer_heads": 0}, "`mixer_heads` must divide the widths 32, got 0"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    changes: dict[str, int], message: str, checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    facts = Facts(**{**vars(FACTS), **changes})
    with pytest.raises(ValueError, match=message):
        convert_ldm(checkpoint, tmp_path / "lego", text_encoder=str(tokenizer), facts=facts)


def test_a_tokenizer_that_is_not_there_is_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("openai/clip-vit-large-patch14", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match="`text_encoder` must be a folder with CLIP's tokenizer") as raised:
            convert_ldm(checkpoint, tmp_path / "lego", text_encoder=name, facts=FACTS)
        assert "vocab.json, merges.txt" in str(raised.value)


def test_a_tokenizer_with_more_tokens_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    words = [f"word{i}</w>" for i in range(700)] + ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert len(CLIPTokenizer.from_pretrained(tmp_path)) == 702
    with pytest.raises(ValueError, match="must have the checkpoint's 600 tokens, got 702"):
        convert_ldm(checkpoint, tmp_path / "lego", text_encoder=str(tmp_path), facts=FACTS)


def test_a_folder_with_other_things_is_left_alone(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="`output` must be a new or an empty folder"):
        convert_ldm(checkpoint, tmp_path, text_encoder=str(tokenizer), facts=FACTS)
    assert (tmp_path / "photo.jpg").exists()


def test_a_pipeline_that_is_there_is_left_alone(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    arguments = {"text_encoder": str(tokenizer), "facts": FACTS}
    (tmp_path / "lego").mkdir()
    convert_ldm(checkpoint, tmp_path / "lego", **arguments)
    (tmp_path / "lego" / "checkpoint-100").mkdir()  # as a run of training has beside its pipeline
    with pytest.raises(ValueError, match="`output` must be a new or an empty folder"):
        convert_ldm(checkpoint, tmp_path / "lego", **arguments)
    assert (tmp_path / "lego" / "checkpoint-100").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["lego"]


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_the_noise_schedule_is_read_from_its_buffer(kind: str) -> None:
    given = LegoEulerAncestralScheduler(500, beta_start=0.001, beta_end=0.02, beta_schedule=kind)
    found = read_schedule(given.betas, given.alphas_cumprod)
    assert {name: found.config[name] for name in ("num_train_timesteps", "beta_start", "beta_end")} == {
        "num_train_timesteps": 500,
        "beta_start": 0.001,
        "beta_end": 0.02,
    }
    assert found.config["beta_schedule"] == kind


def test_another_noise_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="`betas` of the checkpoint must be spaced as"):
        read_schedule(torch.linspace(0.03, 0.1, 10) ** 3, torch.ones(10))
    given = LegoEulerAncestralScheduler()
    with pytest.raises(ValueError, match="`alphas_cumprod` of the checkpoint must be the running product"):
        read_schedule(given.betas, given.alphas_cumprod * torch.linspace(1, 0.999, 1000))


def test_a_vlm_of_the_right_sizes_goes_along(
    make_tiny_pipeline: Callable[..., LegoPipeline], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tiny = make_tiny_pipeline()
    tiny.vlm.save_pretrained(tmp_path / "vlm")
    tiny.vlm_processor.save_pretrained(tmp_path / "vlm")
    arguments: dict[str, Any] = {"text_encoder": str(tokenizer), "vlm": tmp_path / "vlm"}
    convert_ldm(checkpoint, tmp_path / "lego", facts=FACTS, **arguments)
    assert LegoPipeline.from_pretrained(tmp_path / "lego").vlm is not None
    with pytest.raises(ValueError, match="`vlm` must have width 32 and 9 image tokens"):
        convert_ldm(checkpoint, tmp_path / "other", facts=Facts(**{**vars(FACTS), "num_image_tokens": 9}), **arguments)


def test_the_command_converts_and_tells(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "ldm", "--checkpoint", str(checkpoint), "--text-encoder", str(tokenizer), *FLAGS]
    assert main([*command, "--output", str(tmp_path / "a")]) == 0
    output = capsys.readouterr().out
    assert "ema weights" in output
    assert "projections were trained" in output
    assert "unet_heads 4" in output
    assert main([*command, "--output", str(tmp_path / "b"), "--weights", "raw", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["weights"], found["projections"]) == (True, "raw", "trained")


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    command = ["convert", "ldm", "--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "reading it would use os.system" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
