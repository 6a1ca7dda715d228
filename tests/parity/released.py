"""What this package makes of the inputs in a folder of released arrays, file by file.

A folder holds inputs and outputs of the released code at tiny size (its README tells the files). Each function here
takes the inputs of one file and gives the outputs under the same names. Every size is read from the folder. The tests
compare, `make_folder.py` writes other folders of the same form, and the mutation test changes array after array.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import PIL.Image
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from lego_pipeline import guidance, images, parity
from lego_pipeline import scheduler as scheduler_module
from lego_pipeline.conditioning import drop_conditions
from lego_pipeline.convert import layout
from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.convert.ldm import Facts, convert_ldm
from lego_pipeline.diffusion_step import Denoiser, Inputs, losses_of
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.scheduler import LegoEulerAncestralScheduler
from lego_pipeline.training.steps import ResumableEma

Arrays: TypeAlias = dict[str, torch.Tensor]
Files: TypeAlias = dict[str, Arrays]

STATE_DICT, CONFIG = "tiny_ldm_state_dict.safetensors", "tiny_config.json"
NPZ = ("0_dataset", "a_conditioning", "b_unet", "c_latents", "d_guidance", "e_schedule", "f_sampler", "g_training")
PICTURE, GRADIENTS, DECAY = "f_output", "g_gradients", "h_ema_decay"
LEARNING_RATE, WEIGHT_DECAY, DROPOUT, EMA_DECAY = 1e-4, 0.01, 0.05, 0.9999  # of the released training


@dataclass
class Models:
    """The converted checkpoint of a folder.

    Attributes:
        pipeline: with the averaged UNet.
        raw_unet: the UNet without averaging.
        config: tiny_config.json.
        names: of all parameters that get a gradient, in the release's order and by its names.
        trained: of those in the release's optimiser.
    """

    pipeline: LegoPipeline
    raw_unet: UNet2DConditionModel
    config: dict[str, Any]
    names: list[str]
    trained: list[str]


def read_folder(folder: Path) -> Files:
    """All arrays of a parity folder as tensors, by file without suffix; numbers of the JSON files as arrays, too."""
    files: Files = {}
    for name in NPZ:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
            files[name] = {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}
    files[PICTURE] = {"png": torch.from_numpy(np.array(PIL.Image.open(folder / f"{PICTURE}.png")))}
    for name in (GRADIENTS, DECAY):
        content = json.loads((folder / f"{name}.json").read_text())
        files[name] = {
            key: torch.tensor(list(value.values()) if isinstance(value, dict) else value, dtype=torch.float64)
            for key, value in content.items()
            if key != "parameters_in_optimizer"
        }
    return files


def build_models(folder: Path, work: Path) -> Models:
    """Converts the folder's checkpoint twice, averaged and raw, as a user would."""
    config = json.loads((folder / CONFIG).read_text())
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    vocabulary = [f"word{i}</w>" for i in range(config["text"]["vocab_size"] - 2)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "config.json").write_text(json.dumps(config["text"]))
    facts = Facts(
        unet_heads=config["unet"]["num_heads"],
        mixer_heads=config["pi"]["heads"],
        num_image_tokens=config["vllm_image_tokens"],
        num_text_tokens=config["max_text_length"],
        scaling_factor=config["scale_factor"],
        resolution=config["vae"]["ddconfig"]["resolution"],
    )
    pipelines = {}
    for weights in ("ema", "raw"):
        output = work / weights
        convert_ldm(folder / STATE_DICT, output, text_encoder=str(tokenizer), weights=weights, facts=facts)
        pipelines[weights] = LegoPipeline.from_pretrained(output)
        pipelines[weights].set_progress_bar_config(disable=True)
    names = [name for name in read_tensors(folder / STATE_DICT) if name.startswith((layout.UNET, *layout.PROJECTIONS))]
    trained = [name for name in names if name.startswith(layout.UNET)]
    if (folder / f"{GRADIENTS}.json").is_file():
        content = json.loads((folder / f"{GRADIENTS}.json").read_text())
        names, trained = list(content["grad_norms"]), content["parameters_in_optimizer"]
    return Models(pipelines["ema"], pipelines["raw"].unet, config, names, trained)


def dataset(models: Models, files: Files) -> Arrays:
    """0_dataset: frames and features as evaluation and training read them."""
    given = files["0_dataset"]
    side = models.pipeline.config.resolution

    def squeezed(name: str) -> torch.Tensor:
        frames = [parity.squeeze(PIL.Image.fromarray(frame.numpy()), side) for frame in given[name]]
        return torch.stack([images.to_model_input(frame, side, side) for frame in frames])

    before, after = squeezed("image_0_uint8"), squeezed("image_1_uint8")
    count = sum(name.startswith("vllm_text_raw_") for name in given)
    fit = models.pipeline.projector.fit_text
    return {
        "eval_image_0": before,
        "train_input_noflip": before,
        "train_target_noflip": after,
        "train_input_flip": before.flip(-1),
        "train_target_flip": after.flip(-1),
        "vllm_image": given["vllm_image_raw"].float(),
        "vllm_text": torch.stack([fit(given[f"vllm_text_raw_{i}"].float()) for i in range(count)]),
    }


def conditioning(models: Models, files: Files) -> Arrays:
    """a_conditioning: text tower, projections, condition and null condition."""
    given, pipeline = files["a_conditioning"], models.pipeline
    projector = pipeline.projector
    text, null = (pipeline.text_encoder(given[name])[0] for name in ("token_ids", "null_ids"))
    mixed_in = projector.text_projection(given["vllm_text"])
    return {
        "text_embeds": text,
        "null_text_embeds": null,
        "sigma_out": projector.image_projection(given["vllm_image"]),
        "mu_out": mixed_in,
        "pi_out": projector.text_mixer(mixed_in),
        "cond_sequence": projector(text, given["vllm_image"], given["vllm_text"]),
        "uncond_sequence": projector.null_condition(null).expand(len(text), -1, -1),
    }


def unet(models: Models, files: Files) -> Arrays:
    """b_unet: eps of the averaged and the raw UNet, and with the text tokens alone."""
    given = files["b_unet"]
    sample = torch.cat([given["x"], given["concat_latent"]], 1)

    def eps(model: UNet2DConditionModel, context: str) -> torch.Tensor:
        return model(sample, given["timesteps"], given[context]).sample

    averaged = models.pipeline.unet
    return {
        "eps_ema": eps(averaged, "context"),
        "eps_raw": eps(models.raw_unet, "context"),
        "eps_ema_text_only_77": eps(averaged, "text_only_context"),
    }


def latents(models: Models, files: Files) -> Arrays:
    """c_latents: posterior, condition latent, sampled and scaled target, decoded target."""
    given, pipeline = files["c_latents"], models.pipeline
    scale = pipeline.vae.config.scaling_factor
    posterior = pipeline.vae.encode(given["target_image"]).latent_dist
    target = (posterior.mean + posterior.std * given["target_posterior_noise"]) * scale
    return {
        "moments": pipeline.vae.encode(given["image"]).latent_dist.parameters,
        "concat_latent": pipeline.encode_image(given["image"]),
        "target_moments": posterior.parameters,
        "target_latent": target,
        "decoded_target": pipeline.vae.decode(target / scale).sample,
    }


def guided(models: Models, files: Files) -> Arrays:
    """d_guidance: the three denoised predictions, and their combination for every pair of scales."""
    given, pipeline = files["d_guidance"], models.pipeline
    condition, null, frame = _first_sample(files)
    levels = LegoEulerAncestralScheduler.from_config(pipeline.scheduler.config)
    levels.set_timesteps(len(levels))
    sigma = float(levels.sigmas[:-1].flip(0)[int(given["timestep"])])  # the timestep is a whole one
    conditions, parts = guidance.stack_passes(guidance.PASSES, condition, null, frame)
    scaled = (given["x"] / (sigma**2 + 1) ** 0.5).float().expand(3, -1, -1, -1)
    eps = pipeline.unet(torch.cat([scaled, parts], 1), given["timestep"].expand(3), conditions).sample
    three = given["x"] - sigma * eps
    scales = given["scales_text_image"].tolist()
    passes = guidance.PASSES
    return {
        "sigma": torch.tensor(sigma),
        "denoised_three": three,
        "denoised_guided": torch.cat([guidance.combine(three, passes, text, image) for text, image in scales]),
    }


def schedule(models: Models, files: Files) -> Arrays:
    """e_schedule: betas, noise levels, timesteps and ancestral levels, for every number of steps in the file."""
    given, scheduler = files["e_schedule"], models.pipeline.scheduler
    own = LegoEulerAncestralScheduler.from_config(scheduler.config)
    own.set_timesteps(len(own))
    levels = own.sigmas[:-1].flip(0)
    made = {"betas": own.betas, "alphas_cumprod": own.alphas_cumprod, "model_sigmas": levels}
    for steps in (int(name.removeprefix("sigmas_")) for name in given if name.startswith("sigmas_")):
        own.set_timesteps(steps)
        pairs = zip(own.sigmas.tolist(), own.sigmas.tolist()[1:], strict=False)
        down, up = torch.tensor([scheduler_module._ancestral_levels(*pair, 1.0) for pair in pairs]).T
        rounded = own.sigmas[:-1].half().double().log().numpy()
        made |= {
            f"sigmas_{steps}": own.sigmas,
            f"timesteps_{steps}": own.timesteps,
            f"nominal_timesteps_{steps}": own.timesteps,
            f"sigma_down_{steps}": down,
            f"sigma_up_{steps}": up,
            f"timesteps_fp16_sigma_{steps}": torch.from_numpy(
                np.interp(rounded, levels.log(), np.arange(len(levels)))
            ),
        }
    return made


class RecordingScheduler(LegoEulerAncestralScheduler):
    """Keeps what goes into each step and the clean latents that come out."""

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        self.before.append(sample)
        self.denoised.append(result[1])
        return result


def sampler(models: Models, files: Files) -> Arrays:
    """f_sampler: every latent along a trajectory of `LegoPipeline.denoise`, and the picture made of the last one."""
    given, pipeline = files["f_sampler"], models.pipeline
    condition, null, frame = _first_sample(files)
    recorder = RecordingScheduler.from_config(pipeline.scheduler.config)
    recorder.before, recorder.denoised = [], []
    noises = iter(given["step_noises"])
    released, pipeline.scheduler = pipeline.scheduler, recorder
    try:
        with mock.patch.object(scheduler_module, "randn_tensor", lambda *_, **__: next(noises)):
            final = pipeline.denoise(
                given["initial_noise"],
                condition,
                null,
                frame,
                num_inference_steps=len(given["step_noises"]) + 1,
                guidance_scale=float(given["text_scale"]),
                image_guidance_scale=float(given["image_scale"]),
            )
    finally:
        pipeline.scheduler = released
    assert next(noises, None) is None  # no noise in the last step
    decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample[0]
    height, width = given["metadata_height_width"].tolist()
    return {
        "sigmas": recorder.sigmas,
        "x_before_each_step": torch.stack(recorder.before),
        "denoised_each_step": torch.stack(recorder.denoised),
        "final_latent": final,
        "decoded": decoded,
        "resized": parity.released_resize(decoded, width, height),
        "output_uint8": torch.from_numpy(np.array(parity.released_picture(decoded, width, height))),
    }


def picture(models: Models, files: Files) -> Arrays:
    """f_output.png."""
    return {"png": sampler(models, files)["output_uint8"]}


def training(models: Models, files: Files) -> Arrays:
    """g_training: one step on the raw UNet with the file's random numbers."""
    batch, prediction, denoiser, losses = _training_step(models, files)
    released = released_parameters(models)
    before = {name: parameter.detach().clone() for name, parameter in released.items()}
    for parameter in denoiser.projector.parameters():
        parameter.requires_grad_(False)  # `freeze_projections` of train/train_ldm.py
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    losses.mean().backward()
    torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY).step()
    updates = {name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in released.items()}
    with torch.no_grad():
        for name, parameter in released.items():
            parameter.copy_(before[name])
            parameter.requires_grad_(False).grad = None
    with torch.no_grad():
        condition, image_latents = drop_conditions(
            denoiser.condition(batch), batch["null_condition"], batch["image_latents"], batch["drop"], DROPOUT
        )
    return {
        "target_latent": (batch["target"] + batch["target_std"] * batch["posterior_noise"])
        * models.pipeline.vae.config.scaling_factor,
        "concat_latent_after_dropout": image_latents,
        "cond_sequence_after_dropout": condition,
        "noisy_latent": batch["noisy"],
        "eps": prediction.detach(),
        "per_sample_loss": losses.detach(),
        "loss": losses.detach().mean(),
        "max_abs_update_unet": torch.tensor(max(v for k, v in updates.items() if k.startswith(layout.UNET))),
        "max_abs_update_projections": torch.tensor(
            max(v for k, v in updates.items() if not k.startswith(layout.UNET))
        ),
    }


def gradients(models: Models, files: Files) -> Arrays:
    """g_gradients.json: norm of each parameter's gradient, UNet and projections, in the release's order."""
    losses = _training_step(models, files)[3]
    losses.mean().backward()
    released = released_parameters(models)
    norms = {name: float(parameter.grad.double().norm()) for name, parameter in released.items()}
    for parameter in released.values():
        parameter.requires_grad_(False).grad = None

    def total(is_unet: bool) -> torch.Tensor:
        own = [norm for name, norm in norms.items() if name.startswith(layout.UNET) == is_unet]
        return torch.tensor(own, dtype=torch.float64).norm()

    return {
        "loss": losses.detach().mean(),
        "grad_norms": torch.tensor(list(norms.values()), dtype=torch.float64),
        "total_grad_norm_unet": total(True),
        "total_grad_norm_projections": total(False),
    }


def ema_decay(models: Models, files: Files) -> Arrays:
    """h_ema_decay.json: the share of the old average, by the number of updates."""
    average = ResumableEma([torch.nn.Parameter(torch.zeros(1))], decay=EMA_DECAY, update_after_step=-1)
    counts = files[DECAY]["update_number_after_increment"].tolist()
    return {"decay": torch.tensor([average.get_decay(int(count)) for count in counts], dtype=torch.float64)}


def released_parameters(models: Models) -> dict[str, torch.nn.Parameter]:
    """Parameters of the raw UNet and the projector by the release's names, in its order."""
    ours = dict(models.raw_unet.named_parameters())
    markers = {name: torch.empty(1, device="meta") for name in models.names if name.startswith(layout.UNET)}
    converted = convert_ldm_unet_checkpoint(markers, models.raw_unet.config)
    by_marker = {id(marker): name for name, marker in markers.items()}
    found = {by_marker[id(marker)]: ours[name] for name, marker in converted.items()}
    for name, parameter in models.pipeline.projector.named_parameters():
        for theirs, prefix in layout.PROJECTIONS.items():
            if name.startswith(prefix):
                found[theirs + name.removeprefix(prefix)] = parameter
    return {name: found[name] for name in models.names}


def _first_sample(files: Files) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Condition, null condition and condition latent that d_guidance and f_sampler use."""
    sequences = files["a_conditioning"]
    return sequences["cond_sequence"][:1], sequences["uncond_sequence"][:1], files["c_latents"]["concat_latent"][:1]


def _training_step(models: Models, files: Files) -> tuple[dict[str, Any], torch.Tensor, Denoiser, torch.Tensor]:
    """Batch, prediction, denoiser and losses (B,) of the released step, with gradients for UNet and projections."""
    given, pipeline = files["g_training"], models.pipeline
    denoiser = Denoiser(models.raw_unet, pipeline.projector, DROPOUT).eval().requires_grad_(True)
    with torch.no_grad():
        prompt = pipeline.text_encoder(given["token_ids"])[0]
    size = given["noise"].shape
    batch = Inputs(pipeline)(
        {
            "pixels": torch.stack([given["input_image"], given["target_image"]], 1),
            "posterior_noise": given["posterior_noise"],
            "noise": given["noise"],
            "offset": torch.zeros(size[0], 1, 1, 1),
            "timestep": given["timesteps"],
            "drop": given["dropout_draw"],
            "prompt_embeds": prompt,
            "image_embeds": given["vllm_image"],
            "text_embeds": given["vllm_text"],
            "no_vlm": torch.zeros(size[0], dtype=torch.bool),
            "weights": torch.ones(size[0], *size[2:]),
        }
    )
    prediction = denoiser(batch)
    return batch, prediction, denoiser, losses_of(lambda _: prediction, batch)


COMPUTE: dict[str, Callable[[Models, Files], Arrays]] = {
    "0_dataset": dataset,
    "a_conditioning": conditioning,
    "b_unet": unet,
    "c_latents": latents,
    "d_guidance": guided,
    "e_schedule": schedule,
    "f_sampler": sampler,
    PICTURE: picture,
    "g_training": training,
    GRADIENTS: gradients,
    DECAY: ema_decay,
}


def compute(name: str, models: Models, files: Files) -> Arrays:
    """Outputs of a file from its inputs."""
    with torch.set_grad_enabled(name in ("g_training", GRADIENTS)):
        return COMPUTE[name](models, files)
