"""Makes another folder of the reference's form: `python tests/parity/make_folder.py FOLDER` from the root.

Weights are random, sizes, number of levels, token counts, resolution, scales and steps differ from the reference's.
The outputs are this package's own, so such a folder shows only that the parity tests read everything from the files.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel

sys.path.insert(0, str(Path(__file__).parent))

import released
import released_vlm

from lego_pipeline.convert import layout
from lego_pipeline.convert.vlm import VISION
from lego_pipeline.scheduler import LegoEulerAncestralScheduler
from lego_pipeline.vlm.base import DEFAULT_QUESTION

SEED = 7
CONFIG: dict[str, Any] = {
    "unet": {"in_channels": 8, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 1], "num_res_blocks": 2}
    | {"num_heads": 2, "context_dim": 48, "attention_resolutions": [1]},
    "vae": {"ddconfig": {"z_channels": 4, "resolution": 96, "ch": 32, "ch_mult": [1, 2, 1, 1], "num_res_blocks": 2}},
    "text": {"vocab_size": 150, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    | {"num_attention_heads": 3, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "vllm_hidden_size": 40,
    "vllm_image_tokens": 4,
    "max_text_length": 77,
    "scale_factor": 0.18215,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "pi": {"layers": 2, "heads": 8, "dim_feedforward": 96},
}
LLAVA: dict[str, Any] = {
    "llama": {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1}
    | {"eos_token_id": 5, "pad_token_id": 0, "tie_word_embeddings": False},
    "vision": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"image_size": 28, "patch_size": 14, "projection_dim": 8, "hidden_act": "quick_gelu"},
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_token_index": -200,
    "rope_theta": 10000.0,
}
STEPS, SCALES, SCHEDULES = 5, (4.0, 1.25), (4, 30)


def sizes_of(config: dict[str, Any]) -> layout.Sizes:
    """Sizes of the models that a tiny_config.json asks for."""
    unet, vae, text = config["unet"], config["vae"]["ddconfig"], config["text"]
    return layout.Sizes(
        unet_channels=tuple(unet["model_channels"] * factor for factor in unet["channel_mult"]),
        unet_attention=tuple(2**i in unet["attention_resolutions"] for i in range(len(unet["channel_mult"]))),
        unet_layers=unet["num_res_blocks"],
        unet_depth=1,
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        cross_attention_dim=unet["context_dim"],
        vae_channels=tuple(vae["ch"] * factor for factor in vae["ch_mult"]),
        vae_layers=vae["num_res_blocks"],
        latent_channels=vae["z_channels"],
        vocabulary=text["vocab_size"],
        text_width=text["hidden_size"],
        text_feed_forward=text["intermediate_size"],
        text_layers=text["num_hidden_layers"],
        text_length=text["max_position_embeddings"],
        vlm_dim=config["vllm_hidden_size"],
        projector_dim=unet["context_dim"],
        mixer_layers=config["pi"]["layers"],
        mixer_feed_forward=config["pi"]["dim_feedforward"],
        timesteps=config["timesteps"],
    )


def random_state(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Half-precision tensors that keep activations near one: norms around one, biases small."""
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = name.endswith("weight") and len(shape) == 1
        width = noise[0].numel() if len(shape) > 1 else 1
        tensor = 1 + noise / 10 if is_norm else noise / (width**0.5 if len(shape) > 1 else 20)
        state[name] = (tensor / 4 if "embed" in name and len(shape) > 1 else tensor).half()
    return state


def ldm_state(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """A checkpoint under the release's names; averaged and raw UNet differ."""
    sizes = sizes_of(config)
    state = random_state(layout.expected_shapes(sizes, with_ema=True), generator)
    for name in [name for name in state if name.startswith(layout.UNET)]:
        near = state[name].float() + 0.05 * torch.randn(state[name].shape, generator=generator) * state[name].std()
        state[layout.ema_name(name)] = near.half() if state[name].numel() > 1 else state[name]
    scheduler = LegoEulerAncestralScheduler(sizes.timesteps)
    state |= {name: torch.zeros(sizes.timesteps) for name in layout.BUFFERS}
    state |= {"betas": scheduler.betas, "alphas_cumprod": scheduler.alphas_cumprod}
    state[layout.POSITIONS] = torch.arange(sizes.text_length)[None]
    return state | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}


def ldm_inputs(config: dict[str, Any], generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """Inputs of every file of a parity folder."""
    side = config["vae"]["ddconfig"]["resolution"]
    latent = side // 2 ** (len(config["vae"]["ddconfig"]["ch_mult"]) - 1)
    text, width = config["text"], config["unet"]["context_dim"]
    features = config["vllm_image_tokens"], config["vllm_hidden_size"]
    kept = config["max_text_length"], config["vllm_hidden_size"]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def pixels(count: int) -> Tensor:
        return torch.rand(count, 3, side, side, generator=generator) * 2 - 1

    def frames(count: int) -> Tensor:
        return (torch.rand(count, 60, 120, 3, generator=generator) * 255).byte()

    def tokens(count: int) -> Tensor:
        ids = torch.randint(0, text["vocab_size"] - 2, (count, text["max_position_embeddings"]), generator=generator)
        ids[:, 0], ids[:, 20:] = text["vocab_size"] - 2, text["vocab_size"] - 1
        return ids

    null = tokens(1)
    null[:, 1:] = text["vocab_size"] - 1
    length = text["max_position_embeddings"] + config["vllm_image_tokens"] + config["max_text_length"]
    count = 5
    return {
        "0_dataset": {
            "image_0_uint8": frames(2),
            "image_1_uint8": frames(2),
            "vllm_image_raw": noise(2, *features).half(),
            "vllm_text_raw_0": noise(3, features[1]).half(),
            "vllm_text_raw_1": noise(81, features[1]).half(),
        },
        "a_conditioning": {"token_ids": tokens(2), "null_ids": null, "vllm_image": noise(2, *features)}
        | {"vllm_text": noise(2, *kept)},
        "b_unet": {"x": noise(2, 4, latent, latent), "concat_latent": noise(2, 4, latent, latent)}
        | {"timesteps": torch.tensor([3.5, 700.0]), "context": noise(2, length, width)}
        | {"text_only_context": noise(2, text["max_position_embeddings"], width)},
        "c_latents": {"image": pixels(2), "target_image": pixels(2)}
        | {"target_posterior_noise": noise(2, 4, latent, latent)},
        "d_guidance": {"x": noise(1, 4, latent, latent) * 2, "timestep": torch.tensor([400.0])}
        | {"scales_text_image": torch.tensor([[7.5, 1.5], [2.0, 3.0], [1.0, 1.0]], dtype=torch.float64)},
        "e_schedule": {f"sigmas_{steps}": torch.zeros(steps + 1) for steps in SCHEDULES},
        "f_sampler": {"initial_noise": noise(1, 4, latent, latent)}
        | {"step_noises": noise(STEPS - 1, 1, 4, latent, latent), "metadata_height_width": torch.tensor([480, 640])}
        | dict(zip(("text_scale", "image_scale"), torch.tensor(SCALES, dtype=torch.float64), strict=True)),
        "g_training": {"target_image": pixels(count), "input_image": pixels(count), "token_ids": tokens(count)}
        | {"vllm_image": noise(count, *features), "vllm_text": noise(count, *kept)}
        | {"dropout_draw": torch.tensor([0.01, 0.08, 0.13, 0.4, 0.9])}
        | {"posterior_noise": noise(count, 4, latent, latent), "noise": noise(count, 4, latent, latent)}
        | {"timesteps": torch.tensor([2, 999, 400, 40, 700])},
        released.DECAY: {"update_number_after_increment": torch.tensor([2, 40, 500000])},
    }


def make_parity(folder: Path, work: Path) -> None:
    """Writes the parity part."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    (folder / released.CONFIG).write_text(json.dumps(CONFIG))
    save_file(ldm_state(CONFIG, generator), folder / released.STATE_DICT)
    models = released.build_models(folder, work)
    files = ldm_inputs(CONFIG, generator)
    for name in released.COMPUTE:
        files[name] = {**files.get(name, {}), **released.compute(name, models, files)}
    for name in released.NPZ:
        np.savez(folder / f"{name}.npz", **{key: tensor.numpy() for key, tensor in files[name].items()})
    PIL.Image.fromarray(files[released.PICTURE]["png"].numpy()).save(folder / f"{released.PICTURE}.png")
    numbers = {key: tensor.tolist() for key, tensor in files[released.GRADIENTS].items()}
    numbers["grad_norms"] = dict(zip(models.names, numbers["grad_norms"], strict=True))
    numbers["parameters_in_optimizer"] = models.trained
    (folder / f"{released.GRADIENTS}.json").write_text(json.dumps(numbers))
    decay = {key: tensor.tolist() for key, tensor in files[released.DECAY].items()}
    (folder / f"{released.DECAY}.json").write_text(json.dumps(decay))


def write_llava(folder: Path, generator: torch.Generator) -> None:
    """Writes config and random weights of a LLaVA under the release's names."""
    llama, vision = LLAVA["llama"], LLAVA["vision"]
    width, hidden = llama["hidden_size"], llama["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (llama["vocab_size"], width),
        "lm_head.weight": (llama["vocab_size"], width),
        "model.norm.weight": (width,),
        "model.mm_projector.weight": (width, vision["hidden_size"]),
        "model.mm_projector.bias": (width,),
    }
    for number in range(llama["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {f"{layer}self_attn.{key}_proj.weight": (width, width) for key in "qkvo"}
        shapes |= {f"{layer}mlp.{key}_proj.weight": (hidden, width) for key in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{layer}{key}_layernorm.weight": (width,) for key in ("input", "post_attention")}
    tower = CLIPVisionModel(CLIPVisionConfig(**vision))
    prefix = f"{VISION}vision_tower.vision_model."
    shapes |= {prefix + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    (folder / released_vlm.CONFIG).write_text(json.dumps(LLAVA))
    save_file(random_state(shapes, generator), folder / released_vlm.STATE_DICT)


def make_vllm(folder: Path, work: Path) -> None:
    """Writes the VLM part."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    write_llava(folder, generator)
    vlm = released_vlm.build_vlm(folder, work)
    side = LLAVA["vision"]["image_size"]
    given = {
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        "prompt_ids": torch.tensor([[1, 9, 12, -200, 30, 31]]),
        "generated_ids": torch.tensor([], dtype=torch.long),
    }
    for _ in range(7):  # greedy: the answer that the head chooses for itself
        answer = [*given["generated_ids"].tolist(), 2]
        chosen = released_vlm.features(vlm, {**given, "generated_ids": torch.tensor(answer)})["generated_ids"]
        given["generated_ids"] = chosen
    given |= released_vlm.features(vlm, given)
    np.savez(folder / f"{released_vlm.FEATURES}.npz", **{key: tensor.numpy() for key, tensor in given.items()})


def main(folder: Path, work: Path) -> None:
    """Writes a whole folder; `work` holds converted models."""
    torch.manual_seed(SEED)
    for name, make in (("parity", make_parity), ("vllm", make_vllm)):
        (work / name).mkdir(parents=True)
        make(folder / name, work / name)
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language."
    )
    action = "pour the milk"
    prompt = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n<image>\n{DEFAULT_QUESTION.format(action)} [/INST]"
    prompts = {
        "query_template": DEFAULT_QUESTION,
        "action": action,
        "inference_prompt": prompt,
        "training_conversation_with_answer_ANSWER.": f"{prompt} ANSWER. </s>",
        "image_placeholder": "<image>",
        "image_token_index_in_ids": -200,
        "bos_added_by_tokenizer_once_at_start": True,
    }
    (folder / "vllm_prompts.json").write_text(json.dumps(prompts))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]), Path(temporary))
