"""LegoPipeline on the tiny pipeline: stages, guidance and reuse against a plain loop, batches, outputs, callbacks."""

import importlib.util

import numpy as np
import peft
import PIL.Image
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from lego_pipeline.pipeline_lego import LegoPipeline, LegoPipelineOutput
from lego_pipeline.vlm.base import Enhancement

ACTION = "open drawer"
LENGTH = 77 + 4 + 6  # condition tokens of the tiny pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(output: LegoPipelineOutput) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in output.images])


def user_warnings(caught: pytest.WarningsRecorder) -> list[str]:
    """Our own warnings; diffusers' schedulers add deprecations of numpy."""
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding of the largest value; noise starts at a standard deviation of 14."""
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def conditions() -> dict[str, torch.Tensor]:
    """Inputs of `denoise` for two samples."""
    generator = seeded()
    return {
        "latents": torch.randn(2, 6, 8, 8, generator=generator),
        "condition": torch.randn(2, LENGTH, 32, generator=generator),
        "null_condition": torch.randn(1, LENGTH, 32, generator=generator),
        "image_latents": torch.randn(2, 6, 8, 8, generator=generator),
    }


@torch.no_grad()
def plain_denoise(
    pipe: LegoPipeline,
    latents: torch.Tensor,
    condition: torch.Tensor,
    null_condition: torch.Tensor,
    image_latents: torch.Tensor,
    steps: int,
    s_text: float,
    s_image: float,
    guided: set[int] | None = None,
) -> torch.Tensor:
    """Three UNet calls a step, nothing saved, nothing reused: the formula as it is written in the paper."""
    pipe.scheduler.set_timesteps(steps)
    latents = latents * pipe.scheduler.init_noise_sigma
    null_condition = null_condition.expand_as(condition)
    for i, t in enumerate(pipe.scheduler.timesteps):
        scaled = pipe.scheduler.scale_model_input(latents, t)
        with_image = torch.cat([scaled, image_latents], dim=1)
        c = pipe.unet(with_image, t, condition).sample
        m = pipe.unet(with_image, t, null_condition).sample
        u = pipe.unet(torch.cat([scaled, torch.zeros_like(image_latents)], dim=1), t, null_condition).sample
        prediction = u + s_text * (c - m) + s_image * (m - u) if guided is None or i in guided else c
        latents = pipe.scheduler.step(prediction, t, latents).prev_sample
    return latents


def count_rows(pipe: LegoPipeline) -> list[int]:
    """Batch size of every UNet call from now on."""
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    return rows


# --- Denoising against the plain loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("s_text", "s_image", "passes"), [(7.5, 1.5, 3), (7.5, 1.0, 2), (3.0, 3.0, 2), (1.0, 1.0, 1)])
def test_denoising_equals_three_passes_a_step(tiny_pipeline, conditions, prediction_type, s_text, s_image, passes):
    tiny_pipeline.scheduler = EulerDiscreteScheduler.from_config(
        tiny_pipeline.scheduler.config, prediction_type=prediction_type
    )
    expected = plain_denoise(tiny_pipeline, **conditions, steps=3, s_text=s_text, s_image=s_image)
    rows = count_rows(tiny_pipeline)
    with torch.no_grad():
        result = tiny_pipeline.denoise(
            **conditions, num_inference_steps=3, guidance_scale=s_text, image_guidance_scale=s_image
        )
    assert rows == [2 * passes] * 3
    assert_same(result, expected)


def test_outside_the_interval_a_step_is_one_pass(tiny_pipeline, conditions):
    expected = plain_denoise(tiny_pipeline, **conditions, steps=4, s_text=7.5, s_image=1.5, guided={1, 2})
    rows = count_rows(tiny_pipeline)
    with torch.no_grad():
        result = tiny_pipeline.denoise(
            **conditions,
            num_inference_steps=4,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            guidance_interval=(0.25, 0.75),
        )
    assert rows == [2, 6, 6, 2]
    assert_same(result, expected)


def test_a_frame_equals_the_one_of_diffusers_instruct_pix2pix(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline()
    reference = StableDiffusionInstructPix2PixPipeline.from_pipe(
        pipe, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    condition, null_condition = pipe.encode_condition(description="The right hand pulls the drawer.")
    common = {
        "prompt_embeds": condition,
        "negative_prompt_embeds": null_condition,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "output_type": "np",
    }
    ours = pipe(frame, generator=seeded(), **common).images
    theirs = reference(image=pipe_input(frame), generator=seeded(), **common).images
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def pipe_input(frame: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 255


def test_two_samples_may_have_their_own_scales(tiny_pipeline, conditions):
    with torch.no_grad():
        both = tiny_pipeline.denoise(**conditions, guidance_scale=[7.5, 2.0], image_guidance_scale=[1.5, 1.0])
        for i, (s_text, s_image) in enumerate([(7.5, 1.5), (2.0, 1.0)]):
            single = {k: v if len(v) == 1 else v[i : i + 1] for k, v in conditions.items()}
            alone = tiny_pipeline.denoise(**single, guidance_scale=s_text, image_guidance_scale=s_image)
            assert_same(both[i : i + 1], alone)


def test_keys_and_values_are_computed_in_one_step_only(tiny_pipeline, conditions):
    calls = []
    layer = tiny_pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        tiny_pipeline.denoise(**conditions, num_inference_steps=5)
    assert len(calls) == 1


def test_denoising_needs_a_null_condition_where_guidance_is_on(tiny_pipeline, conditions):
    with pytest.raises(ValueError, match="`null_condition` must be given where guidance is on"):
        tiny_pipeline.denoise(**{**conditions, "null_condition": None})


def test_denoising_passes_gradients_to_the_condition(tiny_pipeline, conditions):
    condition = conditions["condition"].requires_grad_()
    tiny_pipeline.denoise(**conditions, num_inference_steps=2).sum().backward()
    assert condition.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of KDPM2's own
def test_any_scheduler_works_and_reads_the_generators(tiny_pipeline, frame, scheduler):
    tiny_pipeline.scheduler = scheduler.from_config(tiny_pipeline.scheduler.config)
    settings = {"description": ["a", "b"], "num_inference_steps": 5, "output_type": "np"}
    first, second = (tiny_pipeline(frame, generator=[seeded(1), seeded(2)], **settings).images for _ in range(2))
    assert np.isfinite(first).all() and np.array_equal(first, second)


def test_a_flow_matching_scheduler_is_refused(tiny_pipeline, frame):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    tiny_pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler` must be of the DDPM family"):
        tiny_pipeline(frame, ACTION)


def test_given_noise_is_scaled_like_drawn_noise(tiny_pipeline, frame):
    noise = torch.randn(1, 6, 8, 8, generator=seeded(3))
    drawn = tiny_pipeline(frame, description="a", generator=seeded(3))
    given = tiny_pipeline(frame, description="a", latents=noise)
    assert np.array_equal(pixels(drawn), pixels(given))


# --- Stages -------------------------------------------------------------------------------------------------------


def test_the_call_equals_its_stages_one_by_one(tiny_pipeline, frame):
    from lego_pipeline import images

    whole = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np")
    with torch.no_grad():
        enhancements = tiny_pipeline.enhance(frame, ACTION, generator=seeded())
        condition, null_condition = tiny_pipeline.encode_condition(enhancements)
        image_latents = tiny_pipeline.encode_image(images.to_model_input(frame, 32, 32)[None])
        noise = tiny_pipeline.prepare_latents(1, 32, 32, seeded())
        latents = tiny_pipeline.denoise(noise, condition, null_condition, image_latents)
        by_hand = tiny_pipeline.decode(latents, "np")
    assert np.array_equal(whole.images, by_hand)
    assert whole.descriptions == [enhancements[0].description]


def test_the_null_condition_is_the_empty_text_and_zeros(tiny_pipeline):
    _, null_condition = tiny_pipeline.encode_condition(description="a")
    assert null_condition.shape == (1, LENGTH, 32)
    assert torch.equal(null_condition[:, :77], tiny_pipeline.encode_prompt(""))
    assert not null_condition[:, 77:].any()


def test_a_negative_prompt_takes_the_place_of_the_empty_text(tiny_pipeline):
    _, null_condition = tiny_pipeline.encode_condition(description="a", negative_prompt="blurred")
    assert torch.equal(null_condition[:, :77], tiny_pipeline.encode_prompt("blurred"))
    assert not null_condition[:, 77:].any()


def test_the_condition_is_text_image_and_mixed_states(tiny_pipeline, frame):
    enhancement = tiny_pipeline.enhance(frame, description="The hand pulls.")[0]
    condition, _ = tiny_pipeline.encode_condition(enhancement)
    projector = tiny_pipeline.projector
    assert torch.equal(condition[0, 77:81], projector.image_projection(enhancement.image_embeds))
    padded = projector.fit_text(enhancement.text_embeds)[None]
    assert torch.allclose(condition[0, 81:], projector.text_mixer(projector.text_projection(padded))[0], atol=1e-6)


def test_image_latents_are_the_unscaled_mode(tiny_pipeline):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = tiny_pipeline.vae.encode(image).latent_dist.mean
    assert torch.equal(tiny_pipeline.encode_image(image), expected)


def test_an_image_that_is_no_multiple_of_the_factor_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 30, 32\)"):
        tiny_pipeline.encode_image(torch.zeros(1, 3, 30, 32))


def test_an_enhancement_needs_no_vlm(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline()
    enhancements = pipe.enhance(frame, ACTION, generator=seeded())
    expected = pixels(pipe(frame, ACTION, generator=seeded()))
    pipe.vlm = None
    assert np.array_equal(pixels(pipe(frame, enhancement=enhancements, generator=seeded())), expected)


def test_a_description_is_embedded_without_sampling(tiny_pipeline, frame, monkeypatch):
    monkeypatch.setattr(tiny_pipeline.vlm, "generate", None)
    output = tiny_pipeline(frame, ACTION, "The right hand pulls the drawer.", generator=seeded())
    assert output.descriptions == ["The right hand pulls the drawer."]


def test_passing_the_sampled_description_gives_the_same_frame(tiny_pipeline, frame):
    sampled = tiny_pipeline(frame, ACTION, generator=seeded(5))
    given = tiny_pipeline(frame, ACTION, sampled.descriptions, generator=seeded(5))
    assert np.array_equal(pixels(sampled), pixels(given))


def test_enhancing_leaves_generators_untouched(tiny_pipeline, frame):
    generator = seeded()
    global_state = torch.random.get_rng_state()
    tiny_pipeline.enhance(frame, ACTION, generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_different_seeds_give_different_descriptions(tiny_pipeline, frame):
    first, second = (tiny_pipeline.enhance(frame, ACTION, generator=seeded(s))[0].description for s in (0, 1))
    assert first != second


def test_prompt_embeds_of_any_length_need_neither_action_nor_vlm(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None)
    embeds = torch.randn(1, 9, 32, generator=seeded())
    output = pipe(frame, prompt_embeds=embeds, negative_prompt_embeds=-embeds, generator=seeded())
    assert output.descriptions is None and len(output.images) == 1


def test_prompt_embeds_of_the_own_length_get_the_own_null(tiny_pipeline, frame):
    condition, null_condition = tiny_pipeline.encode_condition(description="a")
    given = tiny_pipeline(
        frame, prompt_embeds=condition, negative_prompt_embeds=null_condition, generator=seeded(), output_type="np"
    )
    alone = tiny_pipeline(frame, prompt_embeds=condition, generator=seeded(), output_type="np")
    assert np.array_equal(given.images, alone.images)


def test_image_latents_take_the_place_of_the_frame(tiny_pipeline, frame):
    from lego_pipeline import images

    condition, _ = tiny_pipeline.encode_condition(description="a")
    image_latents = tiny_pipeline.encode_image(images.to_model_input(frame, 32, 32)[None])
    given = tiny_pipeline(None, prompt_embeds=condition, image_latents=image_latents, generator=seeded())
    encoded = tiny_pipeline(frame, prompt_embeds=condition, generator=seeded())
    assert np.array_equal(pixels(given), pixels(encoded))


# --- Without a VLM ------------------------------------------------------------------------------------------------


def test_without_a_vlm_its_parts_are_zero_and_one_warning_says_so(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None)
    condition = pipe.projector(pipe.encode_prompt(ACTION))
    expected = pixels(pipe(frame, prompt_embeds=condition, generator=seeded()))
    with pytest.warns(UserWarning, match="Without a VLM") as caught:
        output = pipe(frame, ACTION, generator=seeded())
    assert len(user_warnings(caught)) == 1 and output.descriptions == [ACTION]
    assert np.array_equal(pixels(output), expected)


def test_without_a_vlm_a_checkpoint_trained_so_does_not_warn(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None, vlm_dropout=True)
    assert pipe(frame, ACTION).descriptions == [ACTION]


def test_without_a_vlm_the_description_goes_before_the_action(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None, vlm_dropout=True)
    assert pipe(frame, ACTION, "The hand pulls.").descriptions == ["The hand pulls."]


def test_without_a_vlm_enhance_says_what_to_do(make_tiny_pipeline, frame):
    with pytest.raises(ValueError, match="`enhance` must have a VLM"):
        make_tiny_pipeline(vlm=None, vlm_processor=None).enhance(frame, ACTION)


def test_nothing_to_go_by_is_an_error(tiny_pipeline, frame):
    with pytest.raises(ValueError, match="one source of the condition must be given.*none of them"):
        tiny_pipeline(frame)


# --- Batches ------------------------------------------------------------------------------------------------------


def test_prompt_is_a_synonym_of_action(tiny_pipeline, frame):
    by_action = tiny_pipeline(frame, action=ACTION, generator=seeded())
    by_prompt = tiny_pipeline(frame, prompt=ACTION, generator=seeded())
    assert np.array_equal(pixels(by_action), pixels(by_prompt))


def test_action_and_prompt_together_are_an_error(tiny_pipeline, frame):
    with pytest.raises(ValueError, match="`action` and its synonym `prompt`"):
        tiny_pipeline(frame, action=ACTION, prompt=ACTION)


def test_frames_of_different_sizes_and_actions_go_in_one_call(tiny_pipeline, make_frame):
    frames = [make_frame(32, 32, 1), make_frame(48, 24, 2), make_frame(40, 40, 3), make_frame(24, 48, 4)]
    actions = ["open drawer", "cut onion", "wash cup", "take knife"]
    together = tiny_pipeline(frames, actions, generator=[seeded(i) for i in range(4)])
    assert [image.size for image in together.images] == [frame.size for frame in frames]
    for i in range(4):
        alone = tiny_pipeline(frames[i], actions[i], generator=seeded(i))
        assert alone.descriptions == together.descriptions[i : i + 1]
        difference = np.abs(np.asarray(together.images[i], dtype=int) - np.asarray(alone.images[0], dtype=int))
        assert difference.max() <= 1


def test_one_frame_serves_many_actions(tiny_pipeline, frame):
    output = tiny_pipeline(frame, ["open drawer", "cut onion"], generator=[seeded(0), seeded(1)])
    assert len(output.images) == len(output.descriptions) == 2


def test_one_action_serves_many_frames(tiny_pipeline, make_frame):
    output = tiny_pipeline([make_frame(32, 32, 1), make_frame(32, 32, 2)], ACTION)
    assert len(output.images) == len(output.descriptions) == 2


def test_several_images_of_a_sample_stand_together(tiny_pipeline, frame):
    generators = [seeded(i) for i in range(4)]
    output = tiny_pipeline(frame, description=["a", "b"], num_images_per_prompt=2, generator=generators)
    assert output.descriptions == ["a", "a", "b", "b"]
    alone = tiny_pipeline(frame, description="b", generator=seeded(3))
    assert np.abs(pixels(output)[3] - pixels(alone)[0]).max() <= 1


@pytest.mark.parametrize(
    "arguments", [{"action": ["a", "b"]}, {"description": ["a", "b"]}, {"action": ["a", "b", "c"], "description": "d"}]
)
def test_lists_of_different_lengths_are_refused_with_all_lengths(tiny_pipeline, make_frame, arguments):
    frames = [make_frame(32, 32)] * 4
    with pytest.raises(ValueError, match="lists of a call must have one common length.*`image` 4"):
        tiny_pipeline(frames, **arguments)


# --- Sizes and outputs --------------------------------------------------------------------------------------------


def test_the_result_has_the_size_of_the_frame(tiny_pipeline, make_frame):
    assert tiny_pipeline(make_frame(51, 37), ACTION).images[0].size == (51, 37)


def test_the_result_may_keep_the_size_of_the_model(tiny_pipeline, make_frame):
    assert tiny_pipeline(make_frame(51, 37), ACTION, output_size="model").images[0].size == (36, 28)


def test_height_and_width_set_the_size_of_the_model(tiny_pipeline, frame):
    output = tiny_pipeline(frame, ACTION, height=16, width=24, output_type="latent")
    assert output.images.shape == (1, 6, 4, 6)


def test_a_height_alone_keeps_the_aspect(tiny_pipeline, make_frame):
    output = tiny_pipeline(make_frame(48, 32), ACTION, height=24, output_type="latent")
    assert output.images.shape == (1, 6, 6, 9)


def test_a_height_that_is_no_multiple_of_the_factor_is_refused(tiny_pipeline, frame):
    with pytest.raises(ValueError, match="`height` must be a multiple of 4"):
        tiny_pipeline(frame, ACTION, height=30)


def test_more_than_twofold_enlargement_warns_once_with_both_sizes(tiny_pipeline, make_frame):
    with pytest.warns(UserWarning, match="from 32x32 to 100x100") as caught:
        tiny_pipeline([make_frame(100, 100)] * 2, ACTION)
    assert len(user_warnings(caught)) == 1


def test_output_types_hold_the_same_picture(tiny_pipeline, frame):
    pil, array, tensor = (
        tiny_pipeline(frame, ACTION, generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt")
    )
    assert array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(pil[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_latents_come_back_undecoded(tiny_pipeline, frame):
    latents = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="latent").images
    decoded = tiny_pipeline.decode(latents, "np")
    assert np.array_equal(decoded, tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np").images)


@pytest.mark.parametrize(("output_type", "output_size"), [("np", "input"), ("pt", "model"), ("latent", "input")])
def test_arrays_of_different_sizes_are_refused_before_any_work(
    tiny_pipeline, make_frame, output_type, output_size, monkeypatch
):
    monkeypatch.setattr(tiny_pipeline, "enhance", None)
    frames = [make_frame(32, 32), make_frame(48, 24)]
    with pytest.raises(ValueError, match=f'`output_type="{output_type}"` must give images of one size'):
        tiny_pipeline(frames, ACTION, output_type=output_type, output_size=output_size)


def test_a_tuple_holds_images_and_descriptions(tiny_pipeline, frame):
    images, descriptions = tiny_pipeline(frame, ACTION, return_dict=False)
    assert isinstance(images[0], PIL.Image.Image) and isinstance(descriptions[0], str)


# --- Defaults, warnings -------------------------------------------------------------------------------------------


def test_defaults_come_from_the_checkpoint(make_tiny_pipeline, frame):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "image_guidance_scale": 1.2}
    pipe = make_tiny_pipeline(**settings, guidance_interval=(0.0, 0.5))
    explicit = make_tiny_pipeline()(
        frame, description="a", generator=seeded(), **settings, guidance_interval=(0.0, 0.5)
    )
    assert np.array_equal(pixels(pipe(frame, description="a", generator=seeded())), pixels(explicit))


def test_a_frame_far_from_the_training_frames_warns_by_number(make_tiny_pipeline, make_frame):
    frames = [make_frame(32, 32, 1), make_frame(32, 32, 9)]
    features = [item.image_embeds.mean(0) for item in make_tiny_pipeline().enhance(frames, ACTION)]
    scale = ((features[1] - features[0]).abs() / 3 + 1e-6).tolist()
    directions = torch.eye(len(scale)).tolist()
    statistics = {"directions": directions, "mean": features[0].tolist(), "scale": scale, "limit": 4.0}
    pipe = make_tiny_pipeline(frame_statistics=statistics)
    with pytest.warns(UserWarning, match="has not seen frames like number 1 of this call"):
        pipe(frames, ACTION)
    pipe(frames[0], ACTION)  # warnings are errors here


def test_an_overlong_description_warns_with_the_tail_that_is_cut(tiny_pipeline):
    text = "a " * 75 + "tail"
    with pytest.warns(UserWarning, match="has 81; this was cut off: `tail`"):
        embeds = tiny_pipeline.encode_prompt(text)
    assert torch.equal(embeds, tiny_pipeline.encode_prompt("a " * 75))


def test_a_negative_prompt_without_guidance_warns_that_it_has_no_effect(tiny_pipeline, frame):
    with pytest.warns(UserWarning, match="negative prompt has no effect"):
        tiny_pipeline(frame, ACTION, negative_prompt="blurred", guidance_scale=1.0, image_guidance_scale=1.0)


# --- Callbacks, progress ------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_and_the_tensors_it_asks_for(tiny_pipeline, frame):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"]
    tiny_pipeline(frame, ACTION, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(step, sorted(names)) for step in range(3)]


def test_what_the_callback_returns_replaces_the_latents(tiny_pipeline, frame):
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = tiny_pipeline(frame, ACTION, callback_on_step_end=callback, output_type="latent")
    assert not result.images.any()


def test_a_condition_that_the_callback_replaces_is_not_read_from_memory(tiny_pipeline, conditions):
    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.no_grad():
        reused = tiny_pipeline.denoise(**conditions, **options)
        tiny_pipeline.unet.set_attn_processor(PlainProcessor())
        plain = tiny_pipeline.denoise(**conditions, **options)
    torch.testing.assert_close(reused, plain, atol=1e-6, rtol=0)


class PlainProcessor(AttnProcessor2_0):
    """Diffusers' default under another class, which the memory leaves alone."""


def test_the_callback_may_interrupt(tiny_pipeline, frame):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 0

    tiny_pipeline(frame, ACTION, callback_on_step_end=callback)
    assert steps == [0]
    tiny_pipeline(frame, ACTION, callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step))
    assert steps == [0, 0, 1, 2]


def test_a_callback_class_of_diffusers_names_its_own_tensors(tiny_pipeline, frame):
    class Silence(PipelineCallback):
        tensor_inputs = ["latents", "image_latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert sorted(callback_kwargs) == ["image_latents", "latents"]
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    result = tiny_pipeline(frame, ACTION, callback_on_step_end=Silence(cutoff_step_ratio=1.0), output_type="latent")
    assert not result.images.any()


def test_an_unknown_callback_tensor_is_refused_with_the_known_ones(tiny_pipeline, frame):
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be one of 'latents'"):
        tiny_pipeline(frame, ACTION, callback_on_step_end_tensor_inputs=["noise"])


def test_the_progress_bar_counts_the_steps(tiny_pipeline, frame, capsys):
    tiny_pipeline.set_progress_bar_config(disable=False)
    tiny_pipeline(frame, ACTION)
    assert "3/3" in capsys.readouterr().err


def test_the_old_attention_processors_are_back_after_a_failing_callback(tiny_pipeline, frame):
    def callback(pipe, step, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tiny_pipeline(frame, ACTION, callback_on_step_end=callback)
    assert {type(p) for p in tiny_pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}


# --- What diffusers adds ------------------------------------------------------------------------------------------


def test_slicing_and_tiling_of_the_vae_work(tiny_pipeline, make_frame):
    frames = [make_frame(48, 48, 1), make_frame(48, 48, 2)]
    plain = tiny_pipeline(frames, ACTION, height=48, width=48, generator=seeded(), output_type="np").images
    tiny_pipeline.vae.enable_slicing()
    sliced = tiny_pipeline(frames, ACTION, height=48, width=48, generator=seeded(), output_type="np").images
    np.testing.assert_allclose(sliced, plain, atol=1e-5)
    tiny_pipeline.vae.enable_tiling()
    tiled = tiny_pipeline(frames, ACTION, height=48, width=48, generator=seeded(), output_type="np").images
    assert tiled.shape == plain.shape and np.isfinite(tiled).all()


def test_a_compiled_unet_gives_the_same_frame_without_graph_breaks(tiny_pipeline, frame):
    plain = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np").images
    tiny_pipeline.unet = torch.compile(tiny_pipeline.unet, fullgraph=True, backend="eager")
    compiled = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np").images
    np.testing.assert_allclose(compiled, plain, atol=1e-5)


def test_a_lora_of_the_unet_acts_with_its_scale(tiny_pipeline, frame, tmp_path):
    plain = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np").images
    lora = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    tiny_pipeline.unet.add_adapter(lora)
    tuned = tiny_pipeline(frame, ACTION, generator=seeded(), output_type="np").images
    off = tiny_pipeline(
        frame, ACTION, generator=seeded(), output_type="np", cross_attention_kwargs={"scale": 0.0}
    ).images
    assert np.abs(tuned - plain).max() > 1e-4
    np.testing.assert_allclose(off, plain, atol=1e-6)


def test_a_lora_file_loads_into_the_unet(make_tiny_pipeline, frame, tmp_path):
    pipe, other = make_tiny_pipeline(), make_tiny_pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    LegoPipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    other.load_lora_weights(tmp_path)
    first, second = (p(frame, ACTION, generator=seeded(), output_type="np").images for p in (pipe, other))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_offloading_without_an_accelerator_says_so(tiny_pipeline):
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    assert tiny_pipeline.model_cpu_offload_seq == "vlm->text_encoder->projector->unet->vae"
    with pytest.raises(RuntimeError, match="requires accelerator"):
        tiny_pipeline.enable_model_cpu_offload()


def test_xformers_where_it_is_missing_says_how_to_get_it(tiny_pipeline):
    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("xformers is installed")
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        tiny_pipeline.enable_xformers_memory_efficient_attention()


def test_from_pipe_goes_to_instruct_pix2pix_and_back(make_tiny_pipeline, frame):
    pipe = make_tiny_pipeline(vlm=None, vlm_processor=None, vlm_dropout=True)
    other = StableDiffusionInstructPix2PixPipeline.from_pipe(
        pipe, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    back = LegoPipeline.from_pipe(other, projector=pipe.projector)
    back.set_progress_bar_config(disable=True)
    assert back.config.resolution == 32 and back.config.vlm_dropout
    assert back.unet is pipe.unet
    assert np.array_equal(
        pixels(pipe(frame, ACTION, generator=seeded())), pixels(back(frame, ACTION, generator=seeded()))
    )


def test_an_enhancement_moves_to_the_pipelines_dtype(tiny_pipeline, frame):
    enhancement = tiny_pipeline.enhance(frame, ACTION)[0]
    half = Enhancement(enhancement.description, enhancement.image_embeds.half(), enhancement.text_embeds.half())
    assert np.isfinite(tiny_pipeline(frame, enhancement=half, output_type="np").images).all()
