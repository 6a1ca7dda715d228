"""A checkpoint in ComfyUI against the same checkpoint in `LegoPipeline`: parts alone, and the sampled latents."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.projector import LegoProjector
from lego_pipeline.scheduler import LegoEulerAncestralScheduler

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, BATCH = 5, 2
# Relative rms error of latents: with ComfyUI's conventions of time steps and starting noise, and with others.
SAME, CLOSE = 1e-5, 5e-3


def relative_rms(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).double().square().mean() / theirs.double().square().mean()).sqrt().item()


class Case:
    """One checkpoint in both worlds.

    Args:
        pipe: in the library's.
        model, clip, vae: in ComfyUI's; None if they take no part.
    """

    def __init__(self, adapter: ModuleType, pipe: LegoPipeline, model: Any, clip: Any = None, vae: Any = None):
        self.adapter, self.pipe, self.model, self.clip, self.vae = adapter, pipe, model, clip, vae
        self.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        config = self.pipe.projector.config
        length = 77 + config.num_image_tokens + config.num_text_tokens
        side = self.pipe.unet.config.sample_size
        channels = self.pipe.vae.config.latent_channels

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.condition, self.null = (
            draw(BATCH, length, config.cross_attention_dim),
            draw(1, length, config.cross_attention_dim),
        )
        self.image_latents, self.noise = draw(BATCH, channels, side, side), draw(BATCH, channels, side, side)

    def native(
        self, scales: tuple[float, float], sampler: str = "euler", noises: Any = None, steps: int = STEPS
    ) -> torch.Tensor:
        """Latents scaled as the UNet knows them, from ComfyUI's own sampling."""
        import comfy.samplers

        frame = {"concat_latent_image": self.image_latents}
        conditions = [[self.condition, dict(frame)]], [[self.null, dict(frame)]], [[self.null, {}]]
        guider = self.adapter.two_scale_guider(self.model, *conditions, *scales)
        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "normal", steps)
        extra = {} if noises is None else {"noise_sampler": lambda *_: next(noises)}
        sampler_object = comfy.samplers.KSAMPLER(comfy.samplers.ksampler(sampler).sampler_function, extra)
        with torch.inference_mode():
            latents = guider.sample(
                self.noise.clone(), torch.zeros_like(self.noise), sampler_object, sigmas, disable_pbar=True, seed=0
            )
        return latents * self.pipe.vae.config.scaling_factor

    def ours(self, scheduler: Any, scales: tuple[float, float], steps: int = STEPS) -> torch.Tensor:
        pipe = self.pipe
        pipe.scheduler = scheduler
        with torch.no_grad():
            return pipe.denoise(
                self.noise.clone(),
                self.condition,
                self.null,
                self.image_latents,
                num_inference_steps=steps,
                guidance_scale=scales[0],
                image_guidance_scale=scales[1],
            )

    def scheduler(self, conventions: str, eta: float = 0.0) -> LegoEulerAncestralScheduler:
        config = self.pipe.scheduler.config
        return LegoEulerAncestralScheduler(
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule=config["beta_schedule"],
            prediction_type=config["prediction_type"],
            conventions=conventions,
            eta=eta,
        )


def loaded(adapter: ModuleType, name: str) -> Case:
    """A folder, loaded twice."""
    model, clip, vae, handle = adapter.load_pipeline(name, "float32")
    return Case(adapter, LegoPipeline.from_pretrained(handle.folder, vlm=None, vlm_processor=None), model, clip, vae)


def stable_diffusion_shaped(folder: Path, make_tiny_pipeline: Callable[..., LegoPipeline]) -> None:
    """Saves a pipeline of Stable Diffusion 1.5's layout with random weights.

    The layout is whole: four levels, two layers each, eight heads, four latent channels. Widths are 0.4 times the real
    ones (UNet) and half of them (VAE): it is loaded twice. The real widths have tests of their own.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(128, 256, 512, 512),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=128,
    )
    make_tiny_pipeline(unet=unet, vae=vae, vlm=None, vlm_processor=None, resolution=128).save_pretrained(folder)


@pytest.fixture(scope="module")
def kitchen(adapter: ModuleType) -> Case:
    return loaded(adapter, adapter.EMBEDDED)


@pytest.fixture(scope="module")
def stable_diffusion(
    adapter: ModuleType, comfyui: Path, make_tiny_pipeline: Callable[..., LegoPipeline]
) -> Iterator[Case]:
    folder = comfyui / "models" / "lego" / "sd15"
    stable_diffusion_shaped(folder, make_tiny_pipeline)
    yield loaded(adapter, "sd15")


@pytest.fixture(params=["kitchen", "stable_diffusion"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


# --- Parts alone -------------------------------------------------------------------------------------------------


def test_the_unet_is_the_same(case: Case) -> None:
    latents = torch.cat([case.noise, case.image_latents], dim=1)
    with torch.inference_mode():
        for t in (17.0, 803.0):
            theirs = case.pipe.unet(latents, t, case.condition).sample
            ours = case.model.model.diffusion_model(latents, torch.full((BATCH,), t), context=case.condition)
            assert (ours - theirs).abs().max() < 1e-4


def test_the_vae_is_the_same(case: Case) -> None:
    side = case.pipe.config.resolution
    image = torch.rand(
        BATCH, side, side + 2 * case.pipe.vae_scale_factor, 3, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        latents = case.vae.encode(image)
        expected = case.pipe.encode_image(image.movedim(-1, 1) * 2 - 1)
        assert (latents - expected).abs().max() < 1e-4
        decoded = case.pipe.vae.decode(expected).sample
        assert (case.vae.decode(latents) - (decoded / 2 + 0.5).clamp(0, 1).movedim(1, -1)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "text", ["open the fridge door with the left hand", "", "It's (2:1.5) o'clock: café! 你", "cup " * 200]
)
def test_the_text_encoder_is_the_same(case: Case, text: str) -> None:
    with torch.inference_mode():
        ours = case.adapter.text.encode_text(case.clip, [text, "take cup"])
        theirs = case.pipe.encode_prompt([text, "take cup"])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


def test_comfyuis_own_text_node_reads_the_same_words(kitchen: Case) -> None:
    import nodes

    with torch.inference_mode():
        [[states, _]] = nodes.CLIPTextEncode().encode(kitchen.clip, "open the drawer with the right hand")[0]
        theirs = kitchen.pipe.encode_prompt("open the drawer with the right hand")
    assert (states - theirs).abs().max() < 1e-4


# --- Sampled latents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(7.5, 1.5), (2.0, 1.0), (1.0, 1.0)], ids=str)
def test_latents_are_the_same_with_comfyuis_conventions(case: Case, scales: tuple[float, float]) -> None:
    assert relative_rms(case.native(scales), case.ours(case.scheduler("comfyui"), scales)) < SAME


def test_latents_are_close_with_the_releases_conventions(case: Case) -> None:
    assert 1e-6 < relative_rms(case.native((7.5, 1.5)), case.ours(case.scheduler("k-diffusion"), (7.5, 1.5))) < CLOSE


def test_latents_are_close_with_the_checkpoints_own_scheduler(case: Case) -> None:
    assert relative_rms(case.native((2.0, 1.2)), case.ours(case.pipe.scheduler, (2.0, 1.2))) < CLOSE


def test_ancestral_latents_are_the_same_for_the_same_noise(kitchen: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn(STEPS - 1, *kitchen.noise.shape, generator=torch.Generator().manual_seed(3))
    theirs = kitchen.native((2.0, 1.5), "euler_ancestral", iter(drawn))
    noises = iter(drawn)
    monkeypatch.setattr("lego_pipeline.scheduler.randn_tensor", lambda *_, **__: next(noises))
    assert relative_rms(theirs, kitchen.ours(kitchen.scheduler("comfyui", eta=1.0), (2.0, 1.5))) < SAME


# --- Stable Diffusion 1.5's real widths, random weights ----------------------------------------------------------
# One component at a time, its weights shared by both worlds, so that 860 million parameters fit into 6 GiB.


def show(what: str, error: float, bar: float) -> None:
    """Prints a measured error beside its bar; `pytest -rP` shows it."""
    print(f"{what}: {error:.1e} (bar {bar:.0e})")
    assert error < bar


def test_the_real_unet_and_its_latents(adapter: ModuleType, make_tiny_pipeline: Callable[..., LegoPipeline]) -> None:
    unet = UNet2DConditionModel(sample_size=16, in_channels=8, out_channels=4, cross_attention_dim=768)
    assert unet.config.block_out_channels == (320, 640, 1280, 1280) and unet.config.attention_head_dim == 8
    vae = AutoencoderKL(latent_channels=4, sample_size=128)
    projector = LegoProjector(vlm_dim=32, num_layers=1)  # for the length of 410 tokens
    pipe = make_tiny_pipeline(unet=unet.eval(), vae=vae, projector=projector, vlm=None, vlm_processor=None)
    with torch.inference_mode(False), torch.no_grad():
        latents = partial(adapter.model.LegoLatents, vae)
        model = adapter.model.native_model(unet, pipe.scheduler.config, latents, torch.float32)
    first = next(model.model.diffusion_model.parameters())
    assert first.data_ptr() in {weight.data_ptr() for weight in unet.parameters()}
    case = Case(adapter, pipe, model)
    given = torch.cat([case.noise, case.image_latents], dim=1)
    with torch.inference_mode():
        ours = model.model.diffusion_model(given, torch.full((BATCH,), 803.0), context=case.condition)
        show("UNet alone, largest difference", (ours - unet(given, 803.0, case.condition).sample).abs().max(), 1e-4)
    native = case.native((7.5, 1.5), steps=2)
    for conventions, bar in (("comfyui", SAME), ("k-diffusion", CLOSE)):
        latents = case.ours(case.scheduler(conventions), (7.5, 1.5), steps=2)
        show(f"latents, conventions of {conventions}, relative rms", relative_rms(native, latents), bar)


def test_the_real_vae(adapter: ModuleType) -> None:
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    native, pixels = adapter.vae.native_vae(vae, is_float32=True), torch.rand(1, 128, 128, 3)
    with torch.inference_mode():
        latents, expected = native.encode(pixels), vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        show("VAE, latents, largest difference", (latents - expected).abs().max(), 1e-4)
        decoded = (vae.decode(expected).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        show("VAE, pixels, largest difference", (native.decode(latents) - decoded).abs().max(), 1e-4)


def test_the_real_text_encoder(
    adapter: ModuleType, make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path
) -> None:
    tokenizer = make_tiny_pipeline().tokenizer
    tokenizer.save_pretrained(tmp_path)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", **sizes, **special)).eval()
    clip = adapter.text.native_clip(text_encoder, tokenizer, tmp_path, is_float32=True)
    pipe = make_tiny_pipeline(text_encoder=text_encoder, vlm=None, vlm_processor=None)
    with torch.inference_mode():
        texts = ["open the fridge door with the left hand", ""]
        difference = adapter.text.encode_text(clip, texts) - pipe.encode_prompt(texts)
    show("text encoder, largest difference", difference.abs().max(), 1e-4)
