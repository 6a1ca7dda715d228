"""The checks that diffusers runs on each of its own pipelines, under its names.

Written after `huggingface/diffusers: tests/pipelines/testing_utils/` (PipelineTesterMixin, MemoryTesterMixin,
UNetLoraTesterMixin, LoraTesterMixin, FromPipeTesterMixin), `tests/pipelines/test_pipelines_common.py`
(PipelineLatentTesterMixin, PipelineKarrasSchedulerTesterMixin) and the class of InstructPix2Pix, none of which is in
the wheel.

Tests with a `device` run twice: on the CPU and, marked `gpu`, on a CUDA device. The CPU stands in for an accelerator:
the hooks of offloading are the same, and the weights that a hook has to bring are on `meta` or NaN meanwhile, so a
weight that is read around its hook shows there too.

Checks that don't apply, and why:

- IPAdapterTesterMixin: the frame goes to the UNet through its latents and to the text through the VLM; there is no
  image encoder, and `LegoPipeline` doesn't load IP-Adapters.
- FirstBlockCache, FasterCache, PyramidAttentionBroadcast, MagCache, TaylorSeer: their hooks are for transformers, the
  denoiser here is a UNet. What can be kept between steps, keys and values, is tested in `test_attention.py`.
- test_multi_vae: image latents are the mode of a posterior, which of diffusers' VAEs only AutoencoderKL gives.
- LoRA of the text encoder (`test_simple_inference_with_text_lora...`): the text tower stays frozen in LEGO's training;
  LoRA is for the UNet.
- The slow tests of InstructPix2Pix: they need its released weights.
"""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from lego_pipeline.pipeline_lego import LegoPipeline

ACTION = "open drawer"
DESCRIPTION = "The hand pulls the drawer."
ALL = LegoPipeline._callback_tensor_inputs


def run(pipe: LegoPipeline, frame: Any, **changes: Any) -> torch.Tensor:
    """Two steps on a frame with a given description, seeded; a tensor on the CPU."""
    arguments = {
        "description": DESCRIPTION,
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 2,
        "output_type": "pt",
        **changes,
    }
    return pipe(frame, **arguments)[0].cpu()


def modules(pipe: LegoPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def assert_close(result: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU standing in for an accelerator, and a real one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def reference(make_tiny_pipeline: Callable[..., LegoPipeline], frame: PIL.Image.Image) -> Callable[..., torch.Tensor]:
    """`reference(device="cpu", **changes)`: what an untouched pipeline gives there, computed once."""

    @functools.cache
    def output(device: str = "cpu", **changes: Any) -> torch.Tensor:
        return run(make_tiny_pipeline().to(device), frame, **changes)

    return output


# --- PipelineTesterMixin ------------------------------------------------------------------------------------------


def test_save_load_local(tiny_pipeline, frame, reference, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    loaded = LegoPipeline.from_pretrained(tmp_path)
    assert loaded.components.keys() == tiny_pipeline.components.keys()
    assert_close(run(loaded, frame), reference())


def test_output(reference):
    assert reference().shape == (1, 3, 32, 32) and reference().isfinite().all()


def test_pipeline_call_signature():
    parameters = inspect.signature(LegoPipeline.__call__).parameters
    required = ["image", "prompt", "height", "width", "guidance_scale", "image_guidance_scale", "negative_prompt"]
    required += ["prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs", "callback_on_step_end"]
    optional = ["num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"]
    assert set(required + optional) <= parameters.keys()
    assert all(parameters[name].default is not inspect.Parameter.empty for name in optional)


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_inference_batch_consistent(tiny_pipeline, frame):
    descriptions = [DESCRIPTION, DESCRIPTION[:9], 15 * "very long"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    output = run(tiny_pipeline, [frame] * 3, description=descriptions, generator=generators)
    assert output.shape == (3, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:The text encoder reads 77 tokens")
def test_inference_batch_single_identical(tiny_pipeline, frame, reference):
    descriptions = [DESCRIPTION, DESCRIPTION[:9], 15 * "very long"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    output = run(tiny_pipeline, [frame] * 3, description=descriptions, generator=generators)
    assert_close(output[:1], reference())


def test_dict_tuple_outputs_equivalent(tiny_pipeline, frame, reference):
    assert_close(run(tiny_pipeline, frame, return_dict=False), reference())


def test_components_function(make_tiny_pipeline, tiny_components):
    pipe = make_tiny_pipeline(**tiny_components)
    assert pipe.components.keys() == tiny_components.keys()
    assert all(pipe.components[name] is part for name, part in tiny_components.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inference_no_nan(tiny_pipeline, frame, device, dtype):
    tiny_pipeline.to(device).to(dtype=dtype, silence_dtype_warnings=True)
    assert run(tiny_pipeline, frame, description=None, action=ACTION).isfinite().all()


def test_save_load_float16(tiny_pipeline, frame, device, tmp_path):
    tiny_pipeline.to(device).to(dtype=torch.float16, silence_dtype_warnings=True)
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = LegoPipeline.from_pretrained(tmp_path, dtype=torch.float16).to(device)
    assert {part.dtype for part in modules(loaded).values()} == {torch.float16}
    assert_close(run(loaded, frame), run(tiny_pipeline, frame), atol=1e-2)


@pytest.mark.filterwarnings("ignore:Without a VLM")
def test_save_load_optional_components(tiny_pipeline, frame, tmp_path):
    for name in LegoPipeline._optional_components:
        setattr(tiny_pipeline, name, None)
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = LegoPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in LegoPipeline._optional_components)
    assert_close(run(loaded, frame), run(tiny_pipeline, frame))


def test_to_device(tiny_pipeline, frame, device):
    for place in ("cpu", device):
        assert tiny_pipeline.to(place).device.type == place
        assert {part.device.type for part in modules(tiny_pipeline).values()} == {place}
        assert run(tiny_pipeline, frame).isfinite().all()


def test_to_dtype(tiny_pipeline):
    assert {part.dtype for part in modules(tiny_pipeline).values()} == {torch.float32}
    tiny_pipeline.to(dtype=torch.float16, silence_dtype_warnings=True)
    assert {part.dtype for part in modules(tiny_pipeline).values()} == {torch.float16}


@pytest.mark.parametrize(("batch_size", "per_prompt"), [(1, 2), (2, 1), (2, 2)])
def test_num_images_per_prompt(tiny_pipeline, frame, batch_size, per_prompt):
    output = run(tiny_pipeline, [frame] * batch_size, num_images_per_prompt=per_prompt, num_inference_steps=1)
    assert len(output) == batch_size * per_prompt


def test_cfg(tiny_pipeline, frame):
    without, with_guidance = (run(tiny_pipeline, frame, guidance_scale=scale) for scale in (1.0, 7.5))
    assert without.shape == with_guidance.shape and not torch.allclose(without, with_guidance)


def test_callback_inputs(tiny_pipeline, frame):
    def callback(pipe, step, timestep, tensors):
        assert sorted(tensors) == sorted(expected)
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    for expected in (["latents"], ALL):
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": expected}
        assert not run(tiny_pipeline, frame, output_type="latent", **options).any()


def test_callback_cfg(tiny_pipeline, frame):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ALL}
    run(tiny_pipeline, frame, guidance_scale=2.0, **options)
    assert tiny_pipeline.guidance_scale == 2.0 + tiny_pipeline.num_timesteps


def test_serialization_with_variants(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in modules(tiny_pipeline):
        assert name in index and list((tmp_path / name).glob("*.fp16.*"))


def test_loading_with_variants(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    loaded = modules(LegoPipeline.from_pretrained(tmp_path, variant="fp16"))
    for name, part in modules(tiny_pipeline).items():
        weights = dict(loaded[name].named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in part.named_parameters())


def test_loading_with_incorrect_variants_raises_error(tiny_folder):
    with pytest.raises(ValueError, match="trying to load the model files of the `variant=fp16`"):
        LegoPipeline.from_pretrained(tiny_folder, variant="fp16")


def test_encode_prompt_works_in_isolation(make_tiny_pipeline, frame, reference):
    alone = make_tiny_pipeline(vae=None, unet=None, scheduler=None, projector=None, vlm=None, vlm_processor=None)
    prompt_embeds, null_prompt_embeds = alone.encode_prompt([DESCRIPTION]), alone.encode_prompt("")
    rest = make_tiny_pipeline(text_encoder=None, tokenizer=None)
    seen = rest.enhance(frame, description=DESCRIPTION)[0]
    condition = rest.projector(prompt_embeds, seen.image_embeds[None], [seen.text_embeds])
    null_condition = rest.projector.null_condition(null_prompt_embeds)
    embeds = {"prompt_embeds": condition, "negative_prompt_embeds": null_condition}
    assert_close(run(rest, frame, description=None, **embeds), reference())


def test_torch_dtype_dict(tiny_folder):
    dtypes = {"unet": torch.bfloat16, "default": torch.float16}
    loaded = modules(LegoPipeline.from_pretrained(tiny_folder, dtype=dtypes))
    assert {name: part.dtype for name, part in loaded.items()} == {
        name: dtypes.get(name, torch.float16) for name in loaded
    }


# --- MemoryTesterMixin --------------------------------------------------------------------------------------------


def offload_layers(pipe: LegoPipeline, device: str) -> None:
    """Sequential offload, on the CPU by hand: accelerate's hooks lose weights on "cpu:0", which diffusers asks for."""
    if device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    pipe.remove_all_hooks()
    for name, part in modules(pipe).items():
        if name not in pipe._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def offload_groups(pipe: LegoPipeline, device: str, offload_type: str, folder: Path) -> None:
    """Group offload of each component; on the CPU to disk, with NaN left in memory."""
    for name, part in modules(pipe).items():
        options: dict[str, Any] = {"onload_device": torch.device(device), "offload_type": offload_type}
        options |= {"offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
        options |= {"offload_to_disk_path": str(folder / name)} if device == "cpu" else {}
        if hasattr(part, "enable_group_offload"):
            part.enable_group_offload(**options)
        else:
            apply_group_offloading(part, **options)
        if device == "cpu":
            for weight in part.parameters():
                weight.data.fill_(torch.nan)


@pytest.fixture
def short(make_tiny_pipeline) -> LegoPipeline:
    """A pipeline whose VLM says little, as each token takes its time when layers come one by one."""
    return make_tiny_pipeline(max_new_tokens=2)


@pytest.fixture(scope="module")
def sampled() -> dict[str, Any]:
    """Arguments with which the VLM samples too."""
    return {"description": None, "action": ACTION, "num_inference_steps": 1}


def test_sequential_cpu_offload_forward_pass(short, make_tiny_pipeline, frame, sampled, device):
    expected = run(make_tiny_pipeline(max_new_tokens=2).to(device), frame, **sampled)
    offload_layers(short, device)
    assert short._execution_device.type == device
    assert_close(run(short, frame, **sampled), expected)
    offloaded = {name for name, part in modules(short).items() if part.device.type == "meta"}
    assert offloaded == modules(short).keys() - {"projector"}


def test_model_cpu_offload_forward_pass(short, make_tiny_pipeline, frame, sampled, device):
    expected = run(make_tiny_pipeline(max_new_tokens=2).to(device), frame, **sampled)
    short.enable_model_cpu_offload(device=device)
    assert short._execution_device.type == device
    assert_close(run(short, frame, **sampled), expected)
    assert {part.device.type for part in modules(short).values()} == {"cpu"}
    assert all(hasattr(part, "_hf_hook") for part in modules(short).values())


def test_cpu_offload_forward_pass_twice(short, frame, sampled, device):
    outputs = []
    for _ in range(2):
        short.enable_model_cpu_offload(device=device)
        outputs.append(run(short, frame, **sampled))
    assert_close(*outputs)


def test_sequential_offload_forward_pass_twice(short, frame, device):
    outputs = []
    for _ in range(2):
        offload_layers(short, device)
        outputs.append(run(short, frame, num_inference_steps=1))
    assert_close(*outputs)


def test_pipeline_with_accelerator_device_map(tiny_folder, frame, reference, device):
    loaded = LegoPipeline.from_pretrained(tiny_folder, device_map=device)
    assert_close(run(loaded, frame), reference(device))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_inference(short, make_tiny_pipeline, frame, sampled, device, offload_type, tmp_path):
    expected = run(make_tiny_pipeline(max_new_tokens=2).to(device), frame, **sampled)
    offload_groups(short, device, offload_type, tmp_path)
    assert_close(run(short, frame, **sampled), expected)


def test_pipeline_level_group_offloading_sanity_checks(tiny_pipeline, device):
    tiny_pipeline.enable_group_offload(torch.device(device), offload_type="leaf_level", exclude_modules="unet")
    assert tiny_pipeline.unet.device.type == device
    for name, part in modules(tiny_pipeline).items():
        has_hooks = any(hasattr(layer, "_diffusers_hook") for layer in part.modules())
        assert has_hooks == (name != "unet")
        assert name == "unet" or next(part.parameters()).device.type == "cpu"


def test_pipeline_level_group_offloading_inference(tiny_pipeline, frame, reference, device):
    tiny_pipeline.enable_group_offload(torch.device(device), offload_type="leaf_level")
    assert_close(run(tiny_pipeline, frame), reference(device))


def test_layerwise_casting_inference(tiny_pipeline, frame, device):
    tiny_pipeline.to(device).to(dtype=torch.bfloat16)
    tiny_pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert run(tiny_pipeline, frame).isfinite().all()
    assert tiny_pipeline.unet.mid_block.attentions[0].proj_in.weight.dtype == torch.float8_e4m3fn


def test_sequential_offload_without_an_accelerator_says_so(tiny_pipeline):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        tiny_pipeline.enable_sequential_cpu_offload()


@pytest.mark.gpu
def test_xformers_attention_forwardGenerator_pass(tiny_pipeline, frame, reference):
    pytest.importorskip("xformers")
    tiny_pipeline.to("cuda").enable_xformers_memory_efficient_attention()
    assert_close(run(tiny_pipeline, frame), reference("cuda"), atol=1e-3)


# --- PipelineLatentTesterMixin, PipelineKarrasSchedulerTesterMixin --------------------------------------------------


def as_kind(frame: PIL.Image.Image, kind: str) -> Any:
    array = np.asarray(frame, dtype=np.float32) / 255
    return {"pil": frame, "np": array, "pt": torch.from_numpy(array).permute(2, 0, 1)}[kind]


def test_pt_np_pil_outputs_equivalent(tiny_pipeline, frame, reference):
    generator = torch.Generator()
    options = {"description": DESCRIPTION, "num_inference_steps": 2}
    pil, array = (
        tiny_pipeline(frame, generator=generator.manual_seed(0), output_type=kind, **options).images
        for kind in ("pil", "np")
    )
    np.testing.assert_allclose(array, reference().permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(np.asarray(pil[0]), array[0] * 255, atol=1.0)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_pt_np_pil_inputs_equivalent(tiny_pipeline, frame, reference, kind):
    assert_close(run(tiny_pipeline, as_kind(frame, kind)), reference())


def test_latents_input(tiny_pipeline, frame, reference):
    image_latents = tiny_pipeline.vae.encode(as_kind(frame, "pt")[None] * 2 - 1).latent_dist.mode()
    assert_close(run(tiny_pipeline, frame, image_latents=image_latents), reference())


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of KDPM2's own
def test_karras_schedulers_shape(tiny_pipeline, frame):
    config = {**tiny_pipeline.scheduler.config, "skip_prk_steps": True}
    for member in KarrasDiffusionSchedulers:
        scheduler = getattr(diffusers, member.name)
        if getattr(scheduler, "_backends", ["torch"]) != ["torch"]:
            continue  # a stand-in for a scheduler whose requirement isn't installed (torchsde)
        tiny_pipeline.scheduler = scheduler.from_config(config)
        steps = 5 if "KDPM2" in member.name else 2
        assert run(tiny_pipeline, frame, num_inference_steps=steps).shape == (1, 3, 32, 32), member.name


# --- FromPipeTesterMixin ------------------------------------------------------------------------------------------


def instruct_pix2pix(pipe: LegoPipeline) -> StableDiffusionInstructPix2PixPipeline:
    """Diffusers' pipeline out of the same components."""
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    other = StableDiffusionInstructPix2PixPipeline.from_pipe(pipe, **absent)
    other.set_progress_bar_config(disable=True)
    return other


def from_pipe(other: StableDiffusionInstructPix2PixPipeline, pipe: LegoPipeline) -> LegoPipeline:
    """LegoPipeline out of diffusers' pipeline and the parts that only `pipe` has."""
    back = LegoPipeline.from_pipe(other, projector=pipe.projector, vlm=pipe.vlm, vlm_processor=pipe.vlm_processor)
    back.set_progress_bar_config(disable=True)
    return back


def test_from_pipe_consistent_config(tiny_pipeline):
    other = instruct_pix2pix(tiny_pipeline)
    again = instruct_pix2pix(from_pipe(other, tiny_pipeline))
    public = [{k: v for k, v in pipe.config.items() if not k.startswith("_")} for pipe in (other, again)]
    assert public[0] == public[1]


def test_from_pipe_consistent_forward_pass(tiny_pipeline, frame, reference):
    other = instruct_pix2pix(tiny_pipeline)
    processors = {name: type(processor) for name, processor in other.unet.attn_processors.items()}
    assert_close(run(from_pipe(other, tiny_pipeline), frame), reference())
    assert {name: type(processor) for name, processor in other.unet.attn_processors.items()} == processors


def test_from_pipe_consistent_forward_pass_cpu_offload(tiny_pipeline, frame, reference, device):
    other = instruct_pix2pix(tiny_pipeline)
    other.enable_model_cpu_offload(device=device)
    back = from_pipe(other, tiny_pipeline)
    back.enable_model_cpu_offload(device=device)
    assert_close(run(back, frame), reference(device))


# --- LoraTesterMixin, UNetLoraTesterMixin ---------------------------------------------------------------------------


def add_lora(pipe: LegoPipeline, name: str = "default") -> None:
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(len(pipe.get_list_adapters()) + 1)
        pipe.unet.add_adapter(lora, adapter_name=name)


def differ(*outputs: torch.Tensor) -> bool:
    """Whether no two outputs are the same picture."""
    pairs = [(a, b) for i, a in enumerate(outputs) for b in outputs[:i]]
    return all((a - b).abs().max() > 1e-3 for a, b in pairs)


def test_simple_inference_with_text_denoiser_lora_save_load(tiny_pipeline, frame, tmp_path):
    add_lora(tiny_pipeline)
    expected = run(tiny_pipeline, frame)
    from peft.utils.save_and_load import get_peft_model_state_dict

    metadata = tiny_pipeline.unet.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(tiny_pipeline.unet)
    LegoPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.load_lora_weights(tmp_path)
    assert_close(run(tiny_pipeline, frame), expected)


def test_simple_inference_with_text_denoiser_lora_unloaded(tiny_pipeline, frame, reference):
    add_lora(tiny_pipeline)
    tiny_pipeline.unload_lora_weights()
    assert_close(run(tiny_pipeline, frame), reference())


def test_simple_inference_with_text_denoiser_lora_and_scale(tiny_pipeline, frame, reference):
    add_lora(tiny_pipeline)
    whole, half, none = (run(tiny_pipeline, frame, cross_attention_kwargs={"scale": s}) for s in (1.0, 0.5, 0.0))
    assert differ(whole, half, none)
    assert_close(none, reference())


def test_set_adapters_match_attention_kwargs(tiny_pipeline, frame):
    add_lora(tiny_pipeline)
    expected = run(tiny_pipeline, frame, cross_attention_kwargs={"scale": 0.5})
    tiny_pipeline.set_adapters("default", 0.5)
    assert_close(run(tiny_pipeline, frame), expected)


def test_lora_fuse_unfuse(tiny_pipeline, frame, reference):
    add_lora(tiny_pipeline)
    expected = run(tiny_pipeline, frame)
    assert differ(expected, reference())
    tiny_pipeline.fuse_lora(components=["unet"])
    assert tiny_pipeline.num_fused_loras == 1
    assert_close(run(tiny_pipeline, frame), expected)
    tiny_pipeline.unfuse_lora(components=["unet"])
    assert tiny_pipeline.num_fused_loras == 0
    assert_close(run(tiny_pipeline, frame), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_simple_inference_with_text_denoiser_multi_adapter(tiny_pipeline, frame, reference):
    outputs = [reference()]
    for name in ("first", "second"):
        add_lora(tiny_pipeline, name)
    for names in ("first", "second", ["first", "second"]):
        tiny_pipeline.set_adapters(names)
        outputs.append(run(tiny_pipeline, frame))
    assert differ(*outputs)
    tiny_pipeline.disable_lora()
    assert_close(run(tiny_pipeline, frame), reference())


def test_simple_inference_with_text_denoiser_block_scale(tiny_pipeline, frame, reference):
    add_lora(tiny_pipeline)
    outputs = [reference()]
    for part in ("down", "up"):
        tiny_pipeline.set_adapters("default", {"unet": {part: 5}})
        outputs.append(run(tiny_pipeline, frame))
    assert differ(*outputs)


# --- StableDiffusionInstructPix2PixPipelineFastTests: diffusers' own pipeline instead of noted numbers -------------


def assert_equals_instruct_pix2pix(pipe: LegoPipeline, frames: list[PIL.Image.Image], **arguments: Any) -> None:
    """Both pipelines give the same pictures out of the same conditions and noise."""
    negative_prompt = arguments.pop("negative_prompt", None)
    texts = [DESCRIPTION] * len(frames)
    condition, null_condition = pipe.encode_condition(pipe.enhance(frames, description=texts))
    if negative_prompt is not None:
        null_condition = pipe.encode_null_condition(negative_prompt)
    other = instruct_pix2pix(pipe)
    theirs = other(
        image=torch.stack([as_kind(frame, "pt") for frame in frames]),
        prompt_embeds=condition,
        negative_prompt_embeds=null_condition.expand_as(condition),
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        guidance_scale=6.0,
        image_guidance_scale=1.2,
        output_type="pt",
    ).images
    scales = {"guidance_scale": 6.0, "image_guidance_scale": 1.2}
    ours = run(pipe, frames, description=texts, negative_prompt=negative_prompt, **scales)
    assert_close(ours, theirs, atol=1e-5)


def test_stable_diffusion_pix2pix_default_case(tiny_pipeline, frame):
    assert_equals_instruct_pix2pix(tiny_pipeline, [frame])


def test_stable_diffusion_pix2pix_negative_prompt(tiny_pipeline, frame):
    assert_equals_instruct_pix2pix(tiny_pipeline, [frame], negative_prompt="blurred")


def test_stable_diffusion_pix2pix_multiple_init_images(tiny_pipeline, make_frame):
    assert_equals_instruct_pix2pix(tiny_pipeline, [make_frame(32, 32, 1), make_frame(32, 32, 2)])


def test_stable_diffusion_pix2pix_euler(tiny_pipeline, frame):
    tiny_pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(tiny_pipeline.scheduler.config)
    assert_equals_instruct_pix2pix(tiny_pipeline, [frame])
