"""Cross-attention keys and values computed once per call instead of once per step.

The condition sequence is the same in every denoising step, so the keys and values that a UNet's cross-attention layers
make of it are the same too. `reuse_keys_values` puts a processor with a memory into those layers for the length of one
call and puts the old ones back afterwards, also after an exception. The first step of a plan of passes computes what
later steps of the same plan read, through the layer's own `to_k` and `to_v`: adapters (LoRA) and offloading hooks act
as usual. The mathematics is that of `huggingface/diffusers: models/attention_processor.py`, `AttnProcessor2_0`.

Only layers that carry diffusers' default processor take part; a processor that somebody set (xformers, sliced, fused,
IP-Adapter, own ones) stays. A compiled UNet is left alone as well: the memory would make it recompile.

Letters: B samples of a batch (all passes), L tokens of the condition, H heads, d width of a head.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn import functional


class KeyValueMemory:
    """Which passes the current step stacks, and the keys and values of every layer for each such plan.

    Attributes:
        plan: the passes of the current step, e.g. ("C", "M", "U"); set it before every call of the UNet.
    """

    def __init__(self) -> None:
        self.plan: tuple[str, ...] = ()
        self._held: dict[Attention, dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]]] = {}

    def read(self, layer: Attention) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values (B, H, L, d) of a layer for the current plan, or None if they are not known yet.

        A plan that is the beginning of a known one, ("C",) of ("C", "M", "U"), is a slice of it.
        """
        for plan, (keys, values) in self._held.get(layer, {}).items():
            if plan[: len(self.plan)] == self.plan:
                size = len(keys) // len(plan) * len(self.plan)
                return keys[:size], values[:size]
        return None

    def write(self, layer: Attention, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps keys and values of a layer for the current plan; plans that are its beginning are dropped."""
        others = self._held.get(layer, {}).items()
        kept = {plan: held for plan, held in others if self.plan[: len(plan)] != plan}
        self._held[layer] = {**kept, self.plan: (keys, values)}

    def clear(self) -> None:
        """Forgets everything; needed when the condition changes within a call."""
        self._held.clear()


class ReusingAttnProcessor:
    """Scaled dot-product cross-attention whose keys and values come from a `KeyValueMemory`."""

    def __init__(self, memory: KeyValueMemory):
        self.memory = memory

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if encoder_hidden_states is None or hidden_states.ndim != 3:  # not the cross-attention of a transformer block
            plain = AttnProcessor2_0()
            return plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = _split_heads(attn, attn.to_q(hidden_states))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        keys_values = self.memory.read(attn)
        if keys_values is None:
            keys_values = _keys_values(attn, encoder_hidden_states)
            self.memory.write(attn, *keys_values)
        if attention_mask is not None:
            batch, length, _ = encoder_hidden_states.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        mixed = functional.scaled_dot_product_attention(query, *keys_values, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)  # (B, tokens, H * d)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        if attn.residual_connection:
            mixed = mixed + residual
        return mixed / attn.rescale_output_factor


@contextmanager
def reuse_keys_values(unet: nn.Module) -> Generator[KeyValueMemory, None, None]:
    """Lets the UNet's cross-attention layers compute their keys and values once within the block.

    Yields:
        The memory; set its `plan` before every call of the UNet, `clear()` it when the condition changes. Where no
        layer can take part the memory stays empty and nothing else differs.
    """
    memory = KeyValueMemory()
    layers = [] if is_compiled(unet) else [layer for layer in unet.modules() if _can_reuse(layer)]
    processors = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(ReusingAttnProcessor(memory))
        yield memory
    finally:
        for layer, processor in zip(layers, processors, strict=True):
            layer.set_processor(processor)
        memory.clear()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or a part of it went through `torch.compile`, in place or wrapped."""
    wrapped = isinstance(module, torch._dynamo.OptimizedModule)
    return wrapped or any(part._compiled_call_impl is not None for part in module.modules())


def _can_reuse(layer: nn.Module) -> bool:
    is_cross_attention = isinstance(layer, Attention) and layer.is_cross_attention
    return is_cross_attention and type(layer.processor) is AttnProcessor2_0 and layer.spatial_norm is None


def _keys_values(attn: Attention, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    keys = _split_heads(attn, attn.to_k(encoder_hidden_states))
    values = _split_heads(attn, attn.to_v(encoder_hidden_states))
    return (keys if attn.norm_k is None else attn.norm_k(keys)), values


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    """(B, L, H * d) -> (B, H, L, d)."""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
