"""The projector against the released code's arrays, against arrays of its own, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lego_pipeline.projector import LegoProjector

GOLDEN = Path(__file__).parent / "golden" / "projector.npz"
PARITY = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference")) / "parity"
RELEASED_NAMES = {
    "projection_img": "image_projection",
    "projection_txt": "text_projection",
    "self_attn_mix": "text_mixer",
}


@pytest.fixture
def projector() -> LegoProjector:
    sizes = {"vlm_dim": 12, "cross_attention_dim": 8, "num_image_tokens": 3, "num_text_tokens": 5}
    return LegoProjector(**sizes, num_heads=2, feed_forward_dim=16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def released() -> tuple[LegoProjector, dict[str, torch.Tensor]]:
    """Projector with the weights of the release's tiny fixture, and what the released code made of its inputs."""
    if not PARITY.is_dir():
        pytest.skip(f"no reference arrays in {PARITY}; set LEGO_REFERENCE_DIR")
    arrays = {name: torch.from_numpy(array) for name, array in np.load(PARITY / "a_conditioning.npz").items()}
    weights = {}
    for name, tensor in load_file(PARITY / "tiny_ldm_state_dict.safetensors").items():
        module, _, rest = name.partition(".")
        if module in RELEASED_NAMES:
            weights[f"{RELEASED_NAMES[module]}.{rest}"] = tensor.float()
    (_, image_tokens, vlm_dim), width = arrays["vllm_image"].shape, arrays["sigma_out"].shape[-1]
    projector = LegoProjector(vlm_dim, width, image_tokens, arrays["vllm_text"].shape[1]).eval().requires_grad_(False)
    projector.load_state_dict(weights)
    return projector, arrays


def test_the_condition_is_the_releases(released: tuple[LegoProjector, dict[str, torch.Tensor]]) -> None:
    projector, arrays = released
    condition = projector(arrays["text_embeds"], arrays["vllm_image"], arrays["vllm_text"])
    assert torch.allclose(condition, arrays["cond_sequence"], rtol=0, atol=1e-5)


def test_each_part_is_the_releases(released: tuple[LegoProjector, dict[str, torch.Tensor]]) -> None:
    projector, arrays = released
    text = projector.text_projection(arrays["vllm_text"])
    assert torch.allclose(projector.image_projection(arrays["vllm_image"]), arrays["sigma_out"], rtol=0, atol=1e-5)
    assert torch.allclose(text, arrays["mu_out"], rtol=0, atol=1e-5)
    assert torch.allclose(projector.text_mixer(text), arrays["pi_out"], rtol=0, atol=1e-5)


def test_the_null_condition_is_the_releases(released: tuple[LegoProjector, dict[str, torch.Tensor]]) -> None:
    projector, arrays = released
    null = projector.null_condition(arrays["null_text_embeds"])
    assert torch.allclose(null, arrays["uncond_sequence"][:1], rtol=0, atol=1e-6)


def test_padding_is_that_of_the_release(released: tuple[LegoProjector, dict[str, torch.Tensor]]) -> None:
    projector, arrays = released
    lengths = [int(states.any(1).nonzero().max()) + 1 for states in arrays["vllm_text"]]
    assert min(lengths) < arrays["vllm_text"].shape[1]
    texts = [states[:length] for states, length in zip(arrays["vllm_text"], lengths, strict=True)]
    condition = projector(arrays["text_embeds"], arrays["vllm_image"], texts)
    assert torch.allclose(condition, arrays["cond_sequence"], rtol=0, atol=1e-5)


def test_numbers_are_those_of_the_golden_arrays(projector: LegoProjector) -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items() if array.dtype == np.float32}
    weights = {name.removeprefix("weights."): t for name, t in golden.items() if name.startswith("weights.")}
    projector.load_state_dict(weights)
    texts = [golden["text_embeds_0"], golden["text_embeds_1"]]
    condition = projector(golden["prompt_embeds"], golden["image_embeds"], texts)
    assert torch.allclose(condition, golden["condition"], rtol=0, atol=1e-6)
    assert torch.equal(projector.null_condition(golden["null_prompt_embeds"]), golden["null_condition"])


def test_long_answers_are_cut(projector: LegoProjector) -> None:
    prompt, text = torch.randn(1, 7, 8), torch.randn(1, 9, 12)
    assert torch.equal(projector(prompt, None, text), projector(prompt, None, text[:, :5]))


def test_short_answers_are_padded_before_the_projection(projector: LegoProjector) -> None:
    prompt, text = torch.randn(1, 7, 8), torch.randn(2, 12)
    padded = torch.cat([text, torch.zeros(3, 12)])[None]
    assert torch.equal(projector(prompt, None, [text]), projector(prompt, None, padded))


def test_absent_embeddings_are_zeros_after_the_projection(projector: LegoProjector) -> None:
    prompt = torch.randn(2, 7, 8)
    condition = projector(prompt)
    assert torch.equal(condition[:, :7], prompt)
    assert condition.shape == (2, 15, 8)
    assert not condition[:, 7:].any()


def test_the_null_condition_keeps_its_batch(projector: LegoProjector) -> None:
    assert projector.null_condition(torch.randn(3, 7, 8)).shape == (3, 15, 8)


def test_samples_do_not_see_each_other(projector: LegoProjector) -> None:
    prompt, image = torch.randn(2, 7, 8), torch.randn(2, 3, 12)
    texts = [torch.randn(2, 12), torch.randn(9, 12)]
    both = projector(prompt, image, texts)
    alone = [projector(prompt[i : i + 1], image[i : i + 1], texts[i : i + 1]) for i in (0, 1)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)


def test_dropout_is_off_in_eval_mode_alone(projector: LegoProjector) -> None:
    prompt, text = torch.randn(1, 7, 8), torch.randn(1, 5, 12)
    assert torch.equal(projector(prompt, None, text), projector(prompt, None, text))
    projector.train()
    assert not torch.equal(projector(prompt, None, text), projector(prompt, None, text))


def test_gradients_reach_every_parameter(projector: LegoProjector) -> None:
    projector.requires_grad_(True)
    projector(torch.randn(1, 7, 8), torch.randn(1, 3, 12), torch.randn(1, 5, 12)).square().sum().backward()
    assert [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_saving_and_loading_keeps_the_numbers(projector: LegoProjector, tmp_path: Path) -> None:
    projector.save_pretrained(tmp_path)
    loaded = LegoProjector.from_pretrained(tmp_path).requires_grad_(False)
    prompt, text = torch.randn(1, 7, 8), torch.randn(1, 5, 12)
    assert torch.equal(loaded(prompt, None, text), projector(prompt, None, text))


def test_the_default_sizes_are_the_releases() -> None:
    with torch.device("meta"):
        projector = LegoProjector()
        condition = projector(torch.empty(1, 77, 768), torch.empty(1, 256, 5120), [torch.empty(4, 5120)])
    assert condition.shape == (1, 410, 768)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 2 * 3_932_928 + 11_027_968


@pytest.mark.parametrize(
    ("prompt", "image", "text", "message"),
    [
        ((2, 7, 9), None, None, "`prompt_embeds` must have width 8, got 9"),
        ((2, 7, 8), (2, 4, 12), None, r"`image_embeds` must be \(2, 3, 12\), got \(2, 4, 12\)"),
        ((2, 7, 8), (1, 3, 12), None, r"`image_embeds` must be \(2, 3, 12\), got \(1, 3, 12\)"),
        ((2, 7, 8), None, (2, 5, 11), r"`text_embeds` must be \(T, 12\) per sample, got \(5, 11\)"),
        ((2, 7, 8), None, (1, 5, 12), "`text_embeds` must have 2 samples, got 1"),
    ],
)
def test_wrong_sizes_are_named(
    projector: LegoProjector, prompt: tuple, image: tuple | None, text: tuple | None, message: str
) -> None:
    tensors = [None if shape is None else torch.zeros(shape) for shape in (prompt, image, text)]
    with pytest.raises(ValueError, match=message):
        projector(*tensors)
