"""A released LDM checkpoint as a LegoPipeline folder: UNet, VAE, text tower, projections, tokenizer and scheduler.

UNet and VAE go through diffusers' own converters, the text tower and the projections are renamed, the noise schedule
is read from its buffers. What no tensor tells (numbers of heads, number of image tokens, scaling factor) is `Facts`,
by default those of the release. The file is mapped into memory, and each model is made of its tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tqdm import tqdm
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from lego_pipeline import export
from lego_pipeline.convert import layout
from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.convert.projections import describe_projections
from lego_pipeline.loading import check_component
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.projector import LegoProjector
from lego_pipeline.scheduler import BETA_SCHEDULES, LegoEulerAncestralScheduler
from lego_pipeline.vlm.load import load_processor

TEXT_ENCODER = "openai/clip-vit-large-patch14"
WEIGHTS = ("ema", "raw")
HEAD_WIDTH = 64  # of every text tower of CLIP
GROUPS = 32  # of every group norm of the layout


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a released checkpoint doesn't tell, with the released values.

    Attributes:
        unet_heads, mixer_heads: attention heads of the UNet, on all levels, and of the text mixer.
        num_image_tokens, num_text_tokens: N_i and N_t of the condition.
        scaling_factor: of the latents.
        resolution: side in pixels of the square that the UNet was trained at.
    """

    unet_heads: int = 8
    mixer_heads: int = 8
    num_image_tokens: int = 256
    num_text_tokens: int = 77
    scaling_factor: float = 0.18215
    resolution: int = 256


@dataclass(frozen=True, kw_only=True)
class LdmReport:
    """What a conversion found.

    Attributes:
        output: the folder.
        weights: "ema" or "raw", of the UNet.
        parameters: by component.
        projections: "random initialisation", "trained" or "partly changed".
        projections_reason: a sentence.
        assumed: facts that no tensor tells.
    """

    output: str
    weights: str
    parameters: dict[str, int]
    projections: str
    projections_reason: str
    assumed: dict[str, float]


def convert_ldm(
    checkpoint: Path,
    output: Path,
    *,
    text_encoder: str = TEXT_ENCODER,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    facts: Facts | None = None,
    vlm: Path | None = None,
) -> LdmReport:
    """Converts a checkpoint; the output folder is there as a whole or not at all.

    Args:
        checkpoint: a released .ckpt, or the same names in a .safetensors file.
        output: new or empty folder.
        text_encoder: folder or hub name with the tokenizer, and the text tower's config if it isn't OpenAI's.
        weights: "ema" for the averaged UNet, which the release samples with, or "raw".
        dtype: of the saved weights.
        facts: what the file doesn't tell.
        vlm: converted VLM, put into the folder by links where the file system allows. Its id isn't noted in the
            projector's config, as that reads all of its weights (26 GB for the release); `export.note_vlm` does it.

    Raises:
        FileNotFoundError: no checkpoint, or no VLM there.
        ValueError: something is at `output`; entries that are missing, unknown or of another shape; no averaged
            weights; no tokenizer; sizes that don't fit together; a file that isn't safe to read.
    """
    facts = facts or Facts()
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}.")
    check_output(output)
    state = read_tensors(checkpoint)
    with_ema = any(name.startswith(layout.EMA) for name in state)
    sizes = layout.read_sizes(state)
    layout.check_names(checkpoint, state, layout.expected_shapes(sizes, with_ema=with_ema))
    if weights == "ema" and not with_ema:
        raise ValueError(
            f"`weights` must be 'raw' for {checkpoint}, which holds no averaged weights ({layout.EMA}*), got 'ema'; "
            "the release samples with averaged weights, so look for the file that has them first."
        )
    check_facts(sizes, facts)
    scheduler = read_schedule(state["betas"], state["alphas_cumprod"])
    tokenizer = load_tokenizer(text_encoder, sizes)
    text_config = _text_config(text_encoder, sizes, tokenizer)
    vlm_files = None if vlm is None else _fitting_vlm(vlm, sizes, facts)
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "unet": lambda: _unet(state, sizes, facts, weights, dtype),
        "vae": lambda: _vae(state, sizes, facts, dtype),
        "text_encoder": lambda: _text_encoder(state, text_config, dtype),
        "projector": lambda: _projector(state, sizes, facts, dtype),
    }
    models = {name: make().eval() for name, make in tqdm(makers.items(), "converting", disable=None)}
    verdict, reason = describe_projections(state)
    report = LdmReport(
        output=str(output),
        weights=weights,
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        projections=verdict,
        projections_reason=reason,
        assumed=vars(facts) | {"text_heads": text_config.num_attention_heads},
    )
    components: dict[str, Any] = {**models, "tokenizer": tokenizer, "scheduler": scheduler}
    # The release samples up to 1024 tokens, at temperature 0.2 among the 50 likeliest.
    pipeline = LegoPipeline(**components, resolution=facts.resolution, max_new_tokens=1024)
    with export.whole_folder(output) as unfinished:
        pipeline.save_pretrained(unfinished)
        if vlm_files is not None:
            vlm_files.put_into(unfinished)
        (unfinished / "README.md").write_text(_card(checkpoint, report), encoding="utf-8")
    return report


def check_output(output: Path) -> None:
    """Raises ValueError for a file, or a folder with things in it: the result would take their place."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(
            f"`output` must be a new or an empty folder, but there is something at {output}; name another, or remove "
            "it first."
        )


def check_facts(sizes: layout.Sizes, facts: Facts) -> None:
    """Raises ValueError for heads that don't divide the widths, or a width that the parts don't share."""
    for name, heads, widths in (
        ("unet_heads", facts.unet_heads, sizes.unet_channels),
        ("mixer_heads", facts.mixer_heads, (sizes.projector_dim,)),
    ):
        if heads < 1 or any(width % heads for width in widths):
            raise ValueError(f"`{name}` must divide the widths {', '.join(map(str, widths))}, got {heads}.")
    if not sizes.text_width == sizes.projector_dim == sizes.cross_attention_dim:
        raise ValueError(
            f"`checkpoint` must have one width for text tower, projections and cross-attention, got {sizes.text_width}"
            f", {sizes.projector_dim} and {sizes.cross_attention_dim}; its parts don't belong together."
        )
    if any(width % GROUPS for width in (*sizes.unet_channels, *sizes.vae_channels)):
        raise ValueError(f"`checkpoint` must have widths that are multiples of {GROUPS}, got {sizes.unet_channels}.")


def read_schedule(betas: torch.Tensor, alphas_cumprod: torch.Tensor) -> LegoEulerAncestralScheduler:
    """The released sampler on the noise schedule of a checkpoint.

    Args:
        betas: (T,) of training.
        alphas_cumprod: (T,), which the release samples with.

    Raises:
        ValueError: neither the betas nor their square roots are evenly spaced, or the products aren't theirs.
    """
    start, end = (float(f"{float(beta):.7g}") for beta in (betas[0], betas[-1]))
    for name in BETA_SCHEDULES:
        scheduler = LegoEulerAncestralScheduler(len(betas), beta_start=start, beta_end=end, beta_schedule=name)
        if torch.allclose(scheduler.betas, betas.float(), rtol=1e-5, atol=0):
            if torch.allclose(scheduler.alphas_cumprod, alphas_cumprod.float(), rtol=1e-4, atol=0):
                return scheduler
            raise ValueError(
                "`alphas_cumprod` of the checkpoint must be the running product of 1 - `betas`, got other values; "
                "its noise schedule was changed, which this sampler doesn't know."
            )
    raise ValueError(
        f"`betas` of the checkpoint must be spaced as {' or '.join(BETA_SCHEDULES)}, got {len(betas)} others from "
        f"{start:g} to {end:g}; LEGO's are scaled_linear."
    )


def load_tokenizer(name: str, sizes: layout.Sizes) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder or the hub.

    Raises:
        ValueError: there is none, it can't be reached, or it has more tokens than the text tower.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(_inner(name, "tokenizer"), model_max_length=sizes.text_length)
    except (OSError, ValueError, TypeError) as error:
        tokenizer, reason = None, (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        reason = f"no tokens in {name}"
    if tokenizer is None or len(tokenizer) < 3:
        raise ValueError(
            f"`text_encoder` must be a folder with CLIP's tokenizer, or a hub name that can be reached, got {name!r} "
            f"({reason}); fetch vocab.json, merges.txt and tokenizer_config.json of {TEXT_ENCODER} where there is a "
            "network, and pass their folder."
        )
    if len(tokenizer) > sizes.vocabulary:
        raise ValueError(
            f"`text_encoder` must have the checkpoint's {sizes.vocabulary} tokens, got {len(tokenizer)} in {name}; "
            f"pass the tokenizer that it was trained with, {TEXT_ENCODER} for the release."
        )
    return tokenizer


def _inner(name: str, part: str) -> str:
    """A component's folder where `name` is a whole pipeline's, else `name`."""
    return str(Path(name) / part) if (Path(name) / part).is_dir() else name


def _text_config(name: str, sizes: layout.Sizes, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Config of the text tower: sizes from the weights, the rest from a config beside the tokenizer, or OpenAI's."""
    folder = Path(_inner(name, "text_encoder"))
    given: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content = content.get("text_config") or content
        given = {
            key: content[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps") if key in content
        }
    heads = given.pop("num_attention_heads", max(1, sizes.text_width // HEAD_WIDTH))
    if heads < 1 or sizes.text_width % heads:
        raise ValueError(f"`text_encoder` must have heads that divide the width {sizes.text_width}, got {heads}.")
    return CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_feed_forward,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=heads,
        max_position_embeddings=sizes.text_length,
        projection_dim=sizes.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **given,
    )


def _unet(
    state: Mapping[str, torch.Tensor], sizes: layout.Sizes, facts: Facts, weights: str, dtype: torch.dtype
) -> UNet2DConditionModel:
    names = [name for name in state if name.startswith(layout.UNET)]
    chosen = {name: state[layout.ema_name(name) if weights == "ema" else name] for name in names}
    kinds = ["CrossAttn" if has_attention else "" for has_attention in sizes.unet_attention]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=facts.resolution // 2 ** (len(sizes.vae_channels) - 1),
            in_channels=sizes.in_channels,
            out_channels=sizes.out_channels,
            block_out_channels=sizes.unet_channels,
            layers_per_block=sizes.unet_layers,
            transformer_layers_per_block=sizes.unet_depth,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            cross_attention_dim=sizes.cross_attention_dim,
            attention_head_dim=facts.unet_heads,  # diffusers' name for the number of heads
            norm_num_groups=GROUPS,
        )
    return _filled(unet, convert_ldm_unet_checkpoint(chosen, unet.config), dtype)


def _vae(state: Mapping[str, torch.Tensor], sizes: layout.Sizes, facts: Facts, dtype: torch.dtype) -> AutoencoderKL:
    own = {name: tensor for name, tensor in state.items() if name.startswith(layout.VAE)}
    levels = len(sizes.vae_channels)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=sizes.vae_channels,
            layers_per_block=sizes.vae_layers,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=sizes.latent_channels,
            norm_num_groups=GROUPS,
            sample_size=facts.resolution,
            scaling_factor=facts.scaling_factor,
        )
    return _filled(vae, convert_ldm_vae_checkpoint(own, vae.config), dtype)


def _text_encoder(state: Mapping[str, torch.Tensor], config: CLIPTextConfig, dtype: torch.dtype) -> CLIPTextModel:
    with torch.device("meta"):
        model = CLIPTextModel(config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    own = {
        prefix + name.removeprefix(layout.TEXT): tensor
        for name, tensor in state.items()
        if name.startswith(layout.TEXT) and name != layout.POSITIONS
    }
    return _filled(model, own, dtype)


def _projector(
    state: Mapping[str, torch.Tensor], sizes: layout.Sizes, facts: Facts, dtype: torch.dtype
) -> LegoProjector:
    with torch.device("meta"):
        projector = LegoProjector(
            vlm_dim=sizes.vlm_dim,
            cross_attention_dim=sizes.projector_dim,
            num_image_tokens=facts.num_image_tokens,
            num_text_tokens=facts.num_text_tokens,
            num_layers=sizes.mixer_layers,
            num_heads=facts.mixer_heads,
            feed_forward_dim=sizes.mixer_feed_forward,
        )
    return _filled(projector, dict(_renamed(state)), dtype)


def _filled(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The model around these tensors, which are copied only where the dtype differs."""
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model


def _renamed(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        for theirs, ours in layout.PROJECTIONS.items():
            if name.startswith(theirs):
                yield ours + name.removeprefix(theirs), tensor


def _fitting_vlm(folder: Path, sizes: layout.Sizes, facts: Facts) -> export.VlmFiles:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"`vlm` must be a folder that `lego convert vlm` made, found no config.json in {folder}."
        )
    check_component(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("text_config", {}).get("hidden_size"), config.get("image_seq_length")
    if found != (sizes.vlm_dim, facts.num_image_tokens):
        raise ValueError(
            f"`vlm` must have width {sizes.vlm_dim} and {facts.num_image_tokens} image tokens, as this checkpoint's "
            f"projections, got {found[0]} and {found[1]}; convert the VLM that belongs to it."
        )
    return export.VlmFiles(folder=folder, processor=load_processor(str(folder)))


def _card(checkpoint: Path, report: LdmReport) -> str:
    return CARD.format(
        usage=export.USAGE,
        checkpoint=checkpoint.name,
        weights={"ema": "averaged (EMA)", "raw": "last (raw)"}[report.weights],
        reason=report.projections_reason,
        assumed=", ".join(f"{name} {value:g}" for name, value in report.assumed.items()),
    )


CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags:
- lego-pipeline
- egocentric
- action-frame-generation
---

# LEGO, converted from {checkpoint}

Generates the frame of an action from an egocentric frame and the action's name. A LegoPipeline with the weights of a
checkpoint of LEGO (Lai et al., ECCV 2024), written by `lego convert ldm`; the UNet has the {weights} weights.

{usage}

{reason}

Taken from the release, as no tensor tells it: {assumed}.

## Licence

That of the checkpoint: the authors' model cards say CC-BY-4.0, and the weights start from Stable Diffusion 1.5
(CreativeML Open RAIL-M). Add `license:` to the lines at the top before publishing.
"""
