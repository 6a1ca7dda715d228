"""The kitchen checkpoint's parts before training: what their initial weights already do."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers.models.clip.modeling_clip import CLIPVisionModel

from examples.kitchen import components
from examples.kitchen.frames import box_mask, load_frames, load_masks, psnr, to_unit
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest

TEXTS = ["open the drawer", "wash the plate", "With the right hand, the person pulls the drawer by its handle."]


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """(32, 3, 128, 128) float in [-1, 1]: both frames of 16 rendered pairs."""
    return to_unit(load_frames(read_manifest(FRAMES).select(range(16))).flatten(0, 1))


@pytest.fixture(scope="module")
def vae(frames: torch.Tensor) -> AutoencoderKL:
    torch.manual_seed(0)
    return components.build_vae(frames).requires_grad_(False)


def encode(vae: AutoencoderKL, frames: torch.Tensor) -> torch.Tensor:
    return vae.encode(frames).latent_dist.mode()


def test_latents_are_eight_by_eight_with_48_channels(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    assert encode(vae, frames[:2]).shape == (2, 48, 8, 8)


def test_the_encoder_is_linear(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    first, second = frames[:4], frames[4:8]
    mixed = encode(vae, 0.3 * first + 0.7 * second)
    expected = 0.3 * encode(vae, first) + 0.7 * encode(vae, second)
    assert (mixed - expected).std() < 0.02 * expected.std()


def test_a_linear_map_of_the_latents_restores_the_frames(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    patches = torch.nn.functional.pixel_unshuffle(frames, 16).permute(0, 2, 3, 1).flatten(0, 2)  # (2048, 768)
    latents = encode(vae, frames).permute(0, 2, 3, 1).flatten(0, 2)
    latents = torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
    error = (patches - latents @ torch.linalg.lstsq(latents, patches).solution).square().mean()
    centred = patches - patches.mean(0)
    variances = torch.linalg.eigvalsh(centred.T.double() @ centred.double() / len(patches)).flip(0)
    least = (
        variances[components.LATENT_CHANNELS :].sum() / patches.shape[1]
    )  # no linear code of 48 numbers does better
    assert least <= error < 1.5 * least


def test_a_frames_cells_do_not_see_each_other(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    changed = frames[:1].clone()
    changed[:, :, :16, :16] = -changed[:, :, :16, :16]
    difference = (encode(vae, changed) - encode(vae, frames[:1])).abs().amax(1)[0]
    assert difference[0, 0] > 0.1
    difference[0, 0] = 0
    assert difference.max() < 0.02 * encode(vae, frames[:1]).std()


def test_scaled_latents_have_unit_deviation(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    assert (encode(vae, frames) * vae.config["scaling_factor"]).std().item() == pytest.approx(1, abs=0.01)


def test_the_encoder_adds_no_noise_to_speak_of(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    posterior = vae.encode(frames[:2]).latent_dist
    assert posterior.std.max() < 0.01 * posterior.mode().std()


def test_the_untrained_unet_returns_the_condition_latent() -> None:
    torch.manual_seed(0)
    unet = components.build_unet().requires_grad_(False)
    components.set_copy(unet, 0.6)
    noisy, condition = 5 * torch.randn(2, 48, 8, 8), 1.5 * torch.randn(2, 48, 8, 8)
    states = torch.randn(2, 173, components.CROSS_ATTENTION_DIM)
    output = unet(torch.cat([noisy, condition], 1), torch.tensor([10, 900]), states).sample
    assert (output - 0.6 * condition).std() < 0.02 * 0.6 * 1.5


def test_the_untrained_unet_can_learn_to_leave_the_copy() -> None:
    torch.manual_seed(0)
    unet = components.build_unet()
    components.set_copy(unet, 0.6)
    states = torch.randn(1, 173, components.CROSS_ATTENTION_DIM)
    optimizer = torch.optim.SGD(unet.parameters(), 1e-3)
    for _ in range(2):  # the first step opens the two layers that start at zero, the second reaches those behind them
        optimizer.zero_grad()
        unet(torch.randn(1, 96, 8, 8), 500, states).sample.square().mean().backward()
        optimizer.step()
    assert unet.mid_block.resnets[0].conv1.weight.grad.any()


def test_the_scheduler_asks_for_clean_latents() -> None:
    scheduler = components.build_scheduler()
    assert (scheduler.config["prediction_type"], scheduler.config["timestep_spacing"]) == ("sample", "linspace")


def test_the_projector_takes_what_the_vlm_gives() -> None:
    config = components.build_projector().config
    assert (config["vlm_dim"], config["num_image_tokens"], config["num_text_tokens"]) == (192, 64, 32)


def test_the_same_texts_give_the_same_clip_tokenizer() -> None:
    rows = read_manifest(FRAMES)
    corpus = [*rows["action"][:], *rows["description"][:]]
    merges = {
        json.dumps(json.loads(components.build_clip_tokenizer(corpus).backend_tokenizer.to_str())["model"]["merges"])
        for _ in range(3)
    }
    assert len(merges) == 1


def test_the_clip_tokenizer_reads_its_own_folder(tmp_path: Path) -> None:
    tokenizer = components.build_clip_tokenizer(TEXTS)
    components.save_clip_tokenizer(tokenizer, tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert (tmp_path / "merges.txt").is_file()
    for text in [*TEXTS, "a word that it never saw: Ünïcode!"]:
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_clip_tokens_come_in_clips_order() -> None:
    tokenizer = components.build_clip_tokenizer(TEXTS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("!") == min(tokenizer.get_vocab().values())
    padded = tokenizer(TEXTS[0], padding="max_length").input_ids
    assert len(padded) == 77


def test_the_vlm_has_the_trained_eye_and_answers() -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(components.build_clip(components.build_clip_tokenizer(TEXTS)).config.vision_config).eval()
    vlm, processor = components.build_vlm(TEXTS, tower)
    vlm.eval()
    image = PIL.Image.new("RGB", (128, 128), "red")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == vlm.config.image_token_id).sum() == components.NUM_IMAGE_TOKENS
    with torch.no_grad():
        seen = tower(inputs["pixel_values"]).last_hidden_state
        assert torch.equal(vlm.model.vision_tower(inputs["pixel_values"]).last_hidden_state, seen)
        assert vlm(**inputs).logits.shape[-1] == len(processor.tokenizer)


def test_boxes_are_rounded_outward() -> None:
    mask = box_mask([{"x0": 0.3, "y0": 0.0, "x1": 0.5, "y1": 0.26}], 4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0:2, 1:2] = True
    assert torch.equal(mask, expected)


def test_masks_come_for_both_frames() -> None:
    masks = load_masks(read_manifest(FRAMES).select(range(3)), 128, 128)
    assert masks.shape == (3, 2, 128, 128)
    assert masks[:, 1].flatten(1).any(1).all()


def test_psnr_counts_the_masked_pixels_alone() -> None:
    first, second = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    second[:, :, :2] = 0.2
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    assert psnr(first, second, mask).item() == pytest.approx(20, abs=1e-4)
    assert psnr(first, second).item() == pytest.approx(23.0103, abs=1e-4)
