"""EgoVLP's two towers: a space-time vision transformer and DistilBERT, each with a projection to a common width.

The layers are timm's (patch embedding, attention weights, MLP); the division of attention into time and space is ours,
written from the paper and from the shapes of the released files, and equal to arrays that the released code made
(`tests/evaluation/test_egovlp.py`). Files of the release are read without unpickling the foreign classes in them.

Source: Lin et al., "Egocentric Video-Language Pretraining", NeurIPS 2022; the blocks are those of Bain et al., "Frozen
in Time", ICCV 2021.

Letters: B clips, T frames, P patches of a frame, D width, E width of the common space, H, W size in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from lego_pipeline.convert.checkpoint import read_tensors

HEAD_WIDTH = 64
NORM_EPS = 1e-6
# Frames that the released metrics show a tower, by the file it comes from: Ego4D and Epic Kitchens.
RELEASED_FRAMES = {"egovlp": 4, "epic_mir_plus": 16}
LONGEST_TEXT = 512  # tokens that DistilBERT can read


class SpaceTimeBlock(nn.Module):
    """A transformer block with divided attention: over time within a patch place, then over space within a frame.

    The result of time attention reaches the output through space attention alone: y = x + space(x + time(x)).

    Args:
        dim: D.
        num_heads: of both attentions.
        hidden: width of the MLP.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int):
        super().__init__()
        from timm.layers import Attention, Mlp

        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(3))
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.timeattn = Attention(dim, num_heads, qkv_bias=True)
        self.mlp = Mlp(dim, hidden)

    def forward(self, tokens: torch.Tensor, num_frames: int) -> torch.Tensor:
        """(B, 1 + T P, D) -> the same."""
        timed = tokens + divided_attention(self.timeattn, self.norm3(tokens), num_frames, "time")
        tokens = tokens + divided_attention(self.attn, self.norm1(timed), num_frames, "space")
        return tokens + self.mlp(self.norm2(tokens))


def divided_attention(
    attention: Any, tokens: torch.Tensor, num_frames: int, over: Literal["time", "space"]
) -> torch.Tensor:
    """Attention of each patch to the class token and to its group alone; the class token attends to all tokens.

    Args:
        attention: a timm `Attention`, whose weights are used.
        tokens: (B, 1 + T P, D), class token first, then frame by frame.
        num_frames: T.
        over: "time" groups the T patches of one place, "space" the P patches of one frame.
    """
    batch, length, dim = tokens.shape
    heads = attention.num_heads
    projected = attention.qkv(tokens).reshape(batch, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    query, key, value = projected  # (B, heads, 1 + T P, D / heads) each
    first = functional.scaled_dot_product_attention(query[:, :, :1], key, value)

    def grouped(states: torch.Tensor) -> torch.Tensor:  # (B, heads, groups, members, D / heads)
        states = states[:, :, 1:].unflatten(2, (num_frames, -1))
        return states.transpose(2, 3) if over == "time" else states

    def with_class(states: torch.Tensor) -> torch.Tensor:
        groups = grouped(states)
        own = states[:, :, None, :1].expand(-1, -1, groups.shape[2], -1, -1)
        return torch.cat([own, groups], 3)

    rest = functional.scaled_dot_product_attention(grouped(query), with_class(key), with_class(value))
    rest = (rest.transpose(2, 3) if over == "time" else rest).flatten(2, 3)
    return attention.proj(torch.cat([first, rest], 2).transpose(1, 2).reshape(batch, length, dim))


class SpaceTimeTransformer(nn.Module):
    """EgoVLP's video model; names of the weights as in the released files.

    Args:
        size: H and W.
        patch: side of a patch in pixels.
        dim: D.
        depth: number of blocks.
        num_heads: of each attention.
        hidden: width of the MLPs.
        num_frames: T that the temporal position code is for.
    """

    def __init__(self, size: int, patch: int, dim: int, depth: int, num_heads: int, hidden: int, num_frames: int):
        super().__init__()
        from timm.layers import PatchEmbed

        self.size, self.num_frames = size, num_frames
        self.patch_embed = PatchEmbed(size, patch, embed_dim=dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, dim))
        self.blocks = nn.ModuleList(SpaceTimeBlock(dim, num_heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) normalised -> (B, D), the class token after the last norm."""
        batch, num_frames = frames.shape[:2]
        patches = self.patch_embed(frames.flatten(0, 1)).unflatten(0, (batch, num_frames))  # (B, T, P, D)
        patches = patches + self.pos_embed[:, None, 1:] + self.temporal_embed[:, :num_frames, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        tokens = torch.cat([first, patches.flatten(1, 2)], 1)
        for block in self.blocks:
            tokens = block(tokens, num_frames)
        return self.norm(tokens[:, :1])[:, 0]


class VideoTower(nn.Module):
    """The video model and its projection.

    Args:
        model: of width D.
        width: E.
    """

    def __init__(self, model: SpaceTimeTransformer, width: int):
        super().__init__()
        self.video_model = model
        self.vid_proj = nn.Sequential(nn.Linear(model.norm.normalized_shape[0], width))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) normalised -> (B, E)."""
        return self.vid_proj(self.video_model(frames))


class TextTower(nn.Module):
    """DistilBERT's state of the first token, ReLU, projection.

    Args:
        model: a transformers `DistilBertModel` of width D.
        tokenizer: its tokenizer; None only for weights without texts.
        width: E.
    """

    def __init__(self, model: Any, tokenizer: Any, width: int):
        super().__init__()
        self.text_model, self.tokenizer = model, tokenizer
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(model.config.dim, width))

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, E) of B texts; the padding of shorter ones is masked."""
        device = self.txt_proj[1].weight.device
        longest = min(LONGEST_TEXT, self.text_model.config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return self.txt_proj(self.text_model(**tokens).last_hidden_state[:, 0])


def load_video_tower(path: Path, num_frames: int | None = None, num_heads: int | None = None) -> VideoTower:
    """The video tower of a released file, in evaluation mode, float32.

    Args:
        path: `egovlp.pth`, `epic_mir_plus.pth` or another of their layout, or a .safetensors file of it.
        num_frames: T that it will be shown; the temporal code is cut or extended by zeros. Default: what the released
            metrics show a file of this name, otherwise what the file has.
        num_heads: default D / 64.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, unsafe, or not of this layout.
        ImportError: timm isn't installed.
    """
    state = _read(path, ("video_model.", "vid_proj."))
    try:
        dim, _, patch, _ = state["video_model.patch_embed.proj.weight"].shape
        places = state["video_model.pos_embed"].shape[1] - 1
        temporal = state["video_model.temporal_embed"]
        hidden = state["video_model.blocks.0.mlp.fc1.weight"].shape[0]
        width = state["vid_proj.0.weight"].shape[0]
    except KeyError as error:
        raise _other_layout(path, f"no {error.args[0]}") from error
    depth = len({name.split(".")[2] for name in state if name.startswith("video_model.blocks.")})
    count = num_frames or RELEASED_FRAMES.get(path.stem) or temporal.shape[1]
    extended = torch.zeros(1, count, dim)
    extended[:, : temporal.shape[1]] = temporal[:, :count]
    state = {**state, "video_model.temporal_embed": extended}
    size = round(places**0.5) * patch
    model = SpaceTimeTransformer(size, patch, dim, depth, num_heads or dim // HEAD_WIDTH, hidden, count)
    return _filled(VideoTower(model, width), state, path)


def load_text_tower(path: Path, distilbert: str) -> TextTower:
    """The text tower of a released file, in evaluation mode, float32.

    Args:
        path: as for `load_video_tower`.
        distilbert: folder, or name on the model hub, of DistilBERT's config and tokenizer.

    Raises:
        FileNotFoundError, ValueError: see `load_video_tower`; no DistilBERT there.
    """
    from transformers import AutoConfig, AutoTokenizer, DistilBertModel

    state = _read(path, ("text_model.", "txt_proj."))
    try:
        config = AutoConfig.from_pretrained(distilbert)
        tokenizer = AutoTokenizer.from_pretrained(distilbert)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ValueError(
            f"`distilbert` must be a folder with DistilBERT's config and tokenizer, or its hub name, got {distilbert} "
            f"({reason}); pass the folder distilbert-base-uncased of bolinlai/LEGO-Metrics."
        ) from error
    if config.model_type != "distilbert":
        raise ValueError(f"`distilbert` must be a DistilBERT, got a {config.model_type} at {distilbert}.")
    if "txt_proj.1.weight" not in state:
        raise _other_layout(path, "no txt_proj.1.weight")
    state.pop("text_model.embeddings.position_ids", None)  # a buffer that transformers saved up to 4.30
    return _filled(TextTower(DistilBertModel(config), tokenizer, state["txt_proj.1.weight"].shape[0]), state, path)


def _read(path: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Weights below some prefixes, `module.` of data-parallel training taken off."""
    state = {
        re.sub(r"^module\.", "", name): tensor for name, tensor in read_tensors(path, ignore_foreign=True).items()
    }
    return {name: tensor.float() for name, tensor in state.items() if name.startswith(prefixes)}


def _filled(tower: Any, state: Mapping[str, torch.Tensor], path: Path) -> Any:
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise _other_layout(path, " ".join(str(error).split())[:300]) from error
    return tower.eval().requires_grad_(False)


def _other_layout(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`egovlp` must be a file of EgoVLP's layout, got {path} ({reason}); pass egovlp.pth or epic_mir_plus.pth of "
        "bolinlai/LEGO-Metrics."
    )
