"""Names and shapes of a released LDM checkpoint, worked out from a few of its tensors.

The layout is that of CompVis' latent diffusion (`BolinLai/LEGO: stable_diffusion/`), 1859 entries at full size. Sizes
are read from the tensors at the ends of each part; what the whole file has to hold follows from them, so that a file
can be compared name by name before anything is built.

Letters: C cross-attention width, D VLM width, c latent channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Shapes: TypeAlias = dict[str, tuple[int, ...]]

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
POSITIONS = f"{TEXT}embeddings.position_ids"  # a buffer that transformers kept until 4.31
PROJECTIONS = {
    "projection_img.": "image_projection.",
    "projection_txt.": "text_projection.",
    "self_attn_mix.": "text_mixer.",
}
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
NAMES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that the tensors of a checkpoint tell about its models.

    Attributes:
        unet_channels, unet_attention: of each level: its width, and whether it has cross-attention.
        unet_layers, unet_depth: residual blocks of a level, transformer blocks of an attention.
        in_channels, out_channels, cross_attention_dim: of the UNet.
        vae_channels, vae_layers, latent_channels: likewise of the VAE.
        vocabulary, text_width, text_feed_forward, text_layers, text_length: of the text tower.
        vlm_dim, projector_dim, mixer_layers, mixer_feed_forward: of the three projection modules.
        timesteps: of the noise schedule.
    """

    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]
    unet_layers: int
    unet_depth: int
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    latent_channels: int
    vocabulary: int
    text_width: int
    text_feed_forward: int
    text_layers: int
    text_length: int
    vlm_dim: int
    projector_dim: int
    mixer_layers: int
    mixer_feed_forward: int
    timesteps: int


def read_sizes(state: Mapping[str, torch.Tensor]) -> Sizes:
    """Sizes of the models in a checkpoint; of tensors that are missing, from others of the same width.

    A size that only missing tensors would tell is 1: `check_names` then names the missing ones.

    Raises:
        ValueError: there is no UNet of this layout.
    """
    blocks = _unet_blocks(state)
    if not blocks:
        raise ValueError(
            f"`checkpoint` must be an LDM checkpoint of LEGO, and has no {UNET}input_blocks; pass the released .ckpt, "
            "or for weights in diffusers' layout nothing has to be converted."
        )
    levels = range(max(level for _, level, _ in blocks) + 1)
    of_level = [[block for block in blocks if block[1] == level] for level in levels]
    attention = next((place for place, _, has_attention in blocks if has_attention), "middle_block")
    middle = f"{UNET}middle_block.1.transformer_blocks.0.attn2."

    def size(*candidates: tuple[str, int]) -> int:
        for name, axis in candidates:
            for own in (name, ema_name(name)) if name.startswith(UNET) else (name,):
                if own in state and state[own].ndim > axis:
                    return state[own].shape[axis]
        return 1

    def width(layer: str) -> int:
        return size((f"{layer}.weight", 0), (f"{layer}.bias", 0))

    return Sizes(
        unet_channels=tuple(width(f"{UNET}{own[0][0]}.0.out_layers.3") for own in of_level),
        unet_attention=tuple(any(has_attention for _, _, has_attention in own) for own in of_level),
        unet_layers=max(len(own) for own in of_level),
        unet_depth=_count(state, f"{UNET}{attention}.1.transformer_blocks."),
        in_channels=size((f"{UNET}input_blocks.0.0.weight", 1)),
        out_channels=width(f"{UNET}out.2"),
        cross_attention_dim=size((f"{middle}to_k.weight", 1), (f"{middle}to_v.weight", 1)),
        vae_channels=tuple(
            width(f"{VAE}encoder.down.{level}.block.0.conv1") for level in range(_count(state, f"{VAE}encoder.down."))
        )
        or (1,),
        vae_layers=_count(state, f"{VAE}encoder.down.0.block."),
        latent_channels=width(f"{VAE}post_quant_conv"),
        vocabulary=size((f"{TEXT}embeddings.token_embedding.weight", 0)),
        text_width=width(f"{TEXT}final_layer_norm"),
        text_feed_forward=width(f"{TEXT}encoder.layers.0.mlp.fc1"),
        text_layers=_count(state, f"{TEXT}encoder.layers."),
        text_length=size((f"{TEXT}embeddings.position_embedding.weight", 0), (POSITIONS, 1)),
        vlm_dim=size(("projection_img.weight", 1), ("projection_txt.weight", 1)),
        projector_dim=size(("projection_img.bias", 0), ("projection_txt.bias", 0)),
        mixer_layers=_count(state, "self_attn_mix.layers."),
        mixer_feed_forward=width("self_attn_mix.layers.0.linear1"),
        timesteps=size(("betas", 0), ("alphas_cumprod", 0)),
    )


def expected_shapes(sizes: Sizes, *, with_ema: bool) -> Shapes:
    """Name and shape of every entry of a checkpoint of these sizes."""
    unet = _prefixed(UNET, _unet(sizes))
    shapes: Shapes = {name: (sizes.timesteps,) for name in BUFFERS}
    shapes |= unet | _prefixed(VAE, _vae(sizes)) | _prefixed(TEXT, _text(sizes)) | _projections(sizes)
    if with_ema:
        shapes |= {ema_name(name): shape for name, shape in unet.items()}
        shapes |= {f"{EMA}decay": (), f"{EMA}num_updates": ()}
    return shapes


def ema_name(name: str) -> str:
    """Name of the average of a UNet tensor: without "model." and dots, behind "model_ema."."""
    return EMA + name.removeprefix("model.").replace(".", "")


def check_names(path: Any, found: Mapping[str, torch.Tensor], expected: Shapes) -> None:
    """Compares a checkpoint with what it should hold.

    Raises:
        ValueError: one message with all names that are unknown, missing or of another shape.
    """
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found and name != POSITIONS]
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    lists = {"missing": missing, "unknown": unknown, "of another shape": misshaped}
    problems = [f"{len(names)} {kind}: {shown(names)}" for kind, names in lists.items() if names]
    is_plain = not any(name.startswith(tuple(PROJECTIONS)) for name in found)
    if problems:
        raise ValueError(
            f"`checkpoint` must hold the entries of LEGO's layout and no others, got in {path} {'; '.join(problems)}. "
            + ("Its projections are missing, as in a plain InstructPix2Pix checkpoint. " if is_plain else "")
            + "Download it again, or remove what doesn't belong to it."
        )


def shown(names: list[str]) -> str:
    """Names in one line, the first ones of very many."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unet_blocks(state: Mapping[str, torch.Tensor]) -> list[tuple[str, int, bool]]:
    """(place, level, has attention) of each residual block on the way down; a place is "input_blocks.4"."""
    blocks, level = [], 0
    for number in range(1, _count(state, f"{UNET}input_blocks.")):
        place = f"input_blocks.{number}"
        inner = {name[len(UNET + place) + 1 :][:4] for name in state if name.startswith(f"{UNET}{place}.")}
        if "0.op" in inner:
            level += 1
        else:
            blocks.append((place, level, any(part.startswith("1.") for part in inner)))
    return blocks


def _count(state: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow a prefix: 3 for "prefix.0.weight", "prefix.1.bias", "prefix.2.weight"."""
    found = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    return sum(part.isdigit() for part in found)


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _layer(weight: tuple[int, ...], *, bias: bool = True) -> Shapes:
    return {"weight": weight} | ({"bias": weight[:1]} if bias else {})


def _norm(width: int) -> Shapes:
    return {"weight": (width,), "bias": (width,)}


def _joined(parts: Mapping[str, Shapes]) -> Shapes:
    return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def _unet(sizes: Sizes) -> Shapes:
    base, time = sizes.unet_channels[0], 4 * sizes.unet_channels[0]

    def residual(width_in: int, width: int) -> Shapes:
        return _joined(
            {
                "in_layers.0": _norm(width_in),
                "in_layers.2": _layer((width, width_in, 3, 3)),
                "emb_layers.1": _layer((width, time)),
                "out_layers.0": _norm(width),
                "out_layers.3": _layer((width, width, 3, 3)),
            }
            | ({} if width_in == width else {"skip_connection": _layer((width, width_in, 1, 1))})
        )

    def attention(width: int) -> Shapes:
        return _transformer(width, sizes.cross_attention_dim, sizes.unet_depth)

    parts: dict[str, Shapes] = {
        "time_embed.0": _layer((time, base)),
        "time_embed.2": _layer((time, time)),
        "input_blocks.0.0": _layer((base, sizes.in_channels, 3, 3)),
    }
    levels = len(sizes.unet_channels)
    skips, width, place = [base], base, 1
    for level, level_width in enumerate(sizes.unet_channels):
        for _ in range(sizes.unet_layers):
            parts[f"input_blocks.{place}.0"] = residual(width, level_width)
            if sizes.unet_attention[level]:
                parts[f"input_blocks.{place}.1"] = attention(level_width)
            width, place = level_width, place + 1
            skips.append(width)
        if level < levels - 1:
            parts[f"input_blocks.{place}.0.op"] = _layer((width, width, 3, 3))
            place += 1
            skips.append(width)
    parts["middle_block.0"] = parts["middle_block.2"] = residual(width, width)
    parts["middle_block.1"] = attention(width)
    place = 0
    for level in reversed(range(levels)):
        for layer in range(sizes.unet_layers + 1):
            parts[f"output_blocks.{place}.0"] = residual(width + skips.pop(), sizes.unet_channels[level])
            width = sizes.unet_channels[level]
            if sizes.unet_attention[level]:
                parts[f"output_blocks.{place}.1"] = attention(width)
            if level and layer == sizes.unet_layers:
                number = 2 if sizes.unet_attention[level] else 1
                parts[f"output_blocks.{place}.{number}.conv"] = _layer((width, width, 3, 3))
            place += 1
    parts |= {"out.0": _norm(base), "out.2": _layer((sizes.out_channels, base, 3, 3))}
    return _joined(parts)


def _transformer(width: int, context: int, depth: int) -> Shapes:
    parts = {
        "norm": _norm(width),
        "proj_in": _layer((width, width, 1, 1)),
        "proj_out": _layer((width, width, 1, 1)),
    }
    for block in range(depth):
        for name, source in (("attn1", width), ("attn2", context)):
            inner = f"transformer_blocks.{block}.{name}"
            parts |= {f"{inner}.to_q": _layer((width, width), bias=False)}
            parts |= {f"{inner}.{key}": _layer((width, source), bias=False) for key in ("to_k", "to_v")}
            parts |= {f"{inner}.to_out.0": _layer((width, width))}
        inner = f"transformer_blocks.{block}"
        parts |= {
            f"{inner}.ff.net.0.proj": _layer((8 * width, width)),
            f"{inner}.ff.net.2": _layer((width, 4 * width)),
        }
        parts |= {f"{inner}.norm{number}": _norm(width) for number in (1, 2, 3)}
    return _joined(parts)


def _vae(sizes: Sizes) -> Shapes:
    channels, latent = sizes.vae_channels, sizes.latent_channels
    middle = channels[-1]

    def residual(width_in: int, width: int) -> Shapes:
        parts = {"norm1": _norm(width_in), "conv1": _layer((width, width_in, 3, 3))}
        parts |= {"norm2": _norm(width), "conv2": _layer((width, width, 3, 3))}
        return _joined(parts | ({} if width_in == width else {"nin_shortcut": _layer((width, width_in, 1, 1))}))

    def column(kind: str, order: list[int], layers: int, resampling: str, last: int) -> dict[str, Shapes]:
        parts, width = {}, channels[0] if kind == "down" else middle
        for level in order:
            for layer in range(layers):
                parts[f"{kind}.{level}.block.{layer}"] = residual(width, channels[level])
                width = channels[level]
            if level != last:
                parts[f"{kind}.{level}.{resampling}.conv"] = _layer((width, width, 3, 3))
        return parts

    attention = {"norm": _norm(middle)} | {k: _layer((middle, middle, 1, 1)) for k in ("q", "k", "v", "proj_out")}
    mid = {"mid.block_1": residual(middle, middle), "mid.block_2": residual(middle, middle)}
    mid |= {"mid.attn_1": _joined(attention)}
    top = len(channels) - 1
    encoder = {"conv_in": _layer((channels[0], 3, 3, 3))} | mid
    encoder |= column("down", list(range(top + 1)), sizes.vae_layers, "downsample", top)
    encoder |= {"norm_out": _norm(middle), "conv_out": _layer((2 * latent, middle, 3, 3))}
    decoder = {"conv_in": _layer((middle, latent, 3, 3))} | mid
    decoder |= column("up", list(range(top, -1, -1)), sizes.vae_layers + 1, "upsample", 0)
    decoder |= {"norm_out": _norm(channels[0]), "conv_out": _layer((3, channels[0], 3, 3))}
    parts = {"encoder": _joined(encoder), "decoder": _joined(decoder)}
    parts |= {"quant_conv": _layer((2 * latent, 2 * latent, 1, 1)), "post_quant_conv": _layer((latent, latent, 1, 1))}
    return _joined(parts)


def _text(sizes: Sizes) -> Shapes:
    width, hidden = sizes.text_width, sizes.text_feed_forward
    parts = {
        f"encoder.layers.{layer}.{name}": shapes
        for layer in range(sizes.text_layers)
        for name, shapes in {
            **{f"self_attn.{key}_proj": _layer((width, width)) for key in ("k", "v", "q", "out")},
            "layer_norm1": _norm(width),
            "mlp.fc1": _layer((hidden, width)),
            "mlp.fc2": _layer((width, hidden)),
            "layer_norm2": _norm(width),
        }.items()
    }
    embeddings: Shapes = {
        "embeddings.position_ids": (1, sizes.text_length),
        "embeddings.token_embedding.weight": (sizes.vocabulary, width),
        "embeddings.position_embedding.weight": (sizes.text_length, width),
    }
    return embeddings | _joined(parts | {"final_layer_norm": _norm(width)})


def _projections(sizes: Sizes) -> Shapes:
    width, hidden = sizes.projector_dim, sizes.mixer_feed_forward
    parts = {"projection_img": _layer((width, sizes.vlm_dim)), "projection_txt": _layer((width, sizes.vlm_dim))}
    for layer in range(sizes.mixer_layers):
        inner = f"self_attn_mix.layers.{layer}"
        parts |= {
            f"{inner}.self_attn": {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)},
            f"{inner}.self_attn.out_proj": _layer((width, width)),
            f"{inner}.linear1": _layer((hidden, width)),
            f"{inner}.linear2": _layer((width, hidden)),
            f"{inner}.norm1": _norm(width),
            f"{inner}.norm2": _norm(width),
        }
    return _joined(parts)
