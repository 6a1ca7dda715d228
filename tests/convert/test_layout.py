"""Names and shapes of the released checkpoints, full size on the meta device included."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lego_pipeline.convert import layout, ldm
from lego_pipeline.convert.projections import describe_projections

REFERENCE = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference"))
KEYS = REFERENCE / "keys" / "full_keys.json"
STATE_DICT = REFERENCE / "parity" / "tiny_ldm_state_dict.safetensors"

needs_keys = pytest.mark.skipif(not KEYS.is_file(), reason=f"no keys in {REFERENCE}; set LEGO_REFERENCE_DIR")

SIZES = layout.Sizes(
    unet_channels=(32, 64),
    unet_attention=(True, False),
    unet_layers=1,
    unet_depth=1,
    in_channels=8,
    out_channels=4,
    cross_attention_dim=16,
    vae_channels=(32, 32),
    vae_layers=1,
    latent_channels=4,
    vocabulary=30,
    text_width=16,
    text_feed_forward=20,
    text_layers=1,
    text_length=77,
    vlm_dim=24,
    projector_dim=16,
    mixer_layers=2,
    mixer_feed_forward=32,
    timesteps=1000,
)


def meta_state(sizes: layout.Sizes, *, with_ema: bool = True) -> dict[str, torch.Tensor]:
    shapes = layout.expected_shapes(sizes, with_ema=with_ema)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def full() -> dict[str, torch.Tensor]:
    """The released checkpoint without its values."""
    keys = json.loads(KEYS.read_text())["keys"]
    return {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in keys.items()
    }


@needs_keys
def test_parity_of_all_names_and_shapes_at_full_size(full: dict[str, torch.Tensor]) -> None:
    sizes = layout.read_sizes(full)
    expected = layout.expected_shapes(sizes, with_ema=True)
    assert expected == {name: tuple(tensor.shape) for name, tensor in full.items()}
    layout.check_names("full", full, expected)


@needs_keys
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_parity_of_the_full_size_models(full: dict[str, torch.Tensor], weights: str) -> None:
    sizes, facts, dtype = layout.read_sizes(full), ldm.Facts(), torch.float32
    tokens: Any = SimpleNamespace(bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    models = [
        ldm._unet(full, sizes, facts, weights, dtype),
        ldm._vae(full, sizes, facts, dtype),
        ldm._text_encoder(full, ldm._text_config("openai/clip-vit-large-patch14", sizes, tokens), dtype),
        ldm._projector(full, sizes, facts, dtype),
    ]
    parts = layout.UNET, layout.VAE, layout.TEXT, tuple(layout.PROJECTIONS)
    kept = {name: tensor.numel() for name, tensor in full.items() if name != layout.POSITIONS}
    for model, part in zip(models, parts, strict=True):
        elements = sum(count for name, count in kept.items() if name.startswith(part))
        assert sum(parameter.numel() for parameter in model.parameters()) == elements
    assert models[0].config["attention_head_dim"] == 8
    assert models[2].config.num_attention_heads == sizes.text_width // 64
    assert (models[1].config["scaling_factor"], models[3].config["num_image_tokens"]) == (0.18215, 256)


def test_averaged_names_are_those_of_the_release() -> None:
    name = "model.diffusion_model.time_embed.0.weight"
    assert layout.ema_name(name) == "model_ema.diffusion_modeltime_embed0weight"


@pytest.mark.parametrize("changes", [{}, {"unet_attention": (True, True), "unet_layers": 2}, {"vae_layers": 3}])
def test_sizes_are_read_back(changes: dict) -> None:
    sizes = layout.Sizes(**{**vars(SIZES), **changes})
    state = meta_state(sizes)
    assert layout.read_sizes(state) == sizes
    layout.check_names("x", state, layout.expected_shapes(sizes, with_ema=True))


def test_each_missing_name_is_told_and_no_other() -> None:
    state = meta_state(SIZES)
    for name in [*list(state)[::9], "projection_img.weight", layout.POSITIONS]:
        less = {other: tensor for other, tensor in state.items() if other != name}
        expected = layout.expected_shapes(layout.read_sizes(less), with_ema=True)
        if name == layout.POSITIONS:  # transformers doesn't save it any more
            layout.check_names("x", less, expected)
            continue
        with pytest.raises(ValueError, match="1 missing: ") as raised:
            layout.check_names("x", less, expected)
        assert f"1 missing: {name}. " in str(raised.value)


def test_all_problems_are_one_error() -> None:
    state = meta_state(SIZES)
    del state["betas"], state["projection_txt.bias"]
    state |= {"optimizer.0": torch.empty(1), "cond_stage_model.extra": torch.empty(1)}
    state["first_stage_model.decoder.conv_in.weight"] = torch.empty(3, 3)
    with pytest.raises(ValueError, match="`checkpoint` must hold the entries of LEGO's layout") as raised:
        layout.check_names("model.ckpt", state, layout.expected_shapes(layout.read_sizes(state), with_ema=True))
    message = str(raised.value)
    assert "2 missing: betas, projection_txt.bias" in message
    assert "2 unknown: optimizer.0, cond_stage_model.extra" in message
    assert "1 of another shape: first_stage_model.decoder.conv_in.weight (3, 3) instead of (32, 4, 3, 3)" in message


def test_a_plain_instruct_pix2pix_checkpoint_is_told_as_such() -> None:
    state = {name: t for name, t in meta_state(SIZES).items() if not name.startswith(tuple(layout.PROJECTIONS))}
    with pytest.raises(ValueError, match="as in a plain InstructPix2Pix checkpoint"):
        layout.check_names("x", state, layout.expected_shapes(layout.read_sizes(state), with_ema=True))


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="has no model.diffusion_model.input_blocks"):
        layout.read_sizes({"conv_in.weight": torch.empty(1)})


def projections(*, trained: bool = False) -> dict[str, torch.Tensor]:
    """As the released training code makes them, and after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linears = {name: torch.nn.Linear(24, 16) for name in ("projection_img", "projection_txt")}
        layer = torch.nn.TransformerEncoderLayer(16, 8, 32, norm_first=True, batch_first=True)
        mixer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        modules = {**linears, "self_attn_mix": mixer}
        state = {f"{name}.{key}": t for name, m in modules.items() for key, t in m.state_dict().items()}
        return {name: tensor + trained * torch.randn_like(tensor) / 2 for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_projections_at_random_initialisation_are_recognised(dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in projections().items()}
    verdict, reason = describe_projections(state)
    assert verdict == "random initialisation"
    assert "never trained" in reason


def test_trained_projections_are_recognised() -> None:
    assert describe_projections(projections(trained=True))[0] == "trained"


@pytest.mark.parametrize(
    "name",
    ["projection_img.weight", "self_attn_mix.layers.1.norm1.weight", "self_attn_mix.layers.0.self_attn.in_proj_bias"],
)
def test_one_changed_projection_is_told(name: str) -> None:
    state = projections()
    state[name] = state[name] + 0.5
    verdict, reason = describe_projections(state)
    assert verdict == "partly changed"
    assert "these don't" in reason
