"""The trainable bridge from the visual LLM to the diffusion model's cross-attention.

LEGO (Lai et al., ECCV 2024, section 3.3) maps the VLM's image embeddings with sigma and its text embeddings with mu
followed by pi, and appends both to the CLIP encoding of the enriched description:
``[psi(R) (77) ; sigma(F_img) (N_i) ; pi(mu(F_txt)) (N_t)]``. Facts from `BolinLai/LEGO:
stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`; unlike there, the modules here are one `ModelMixin` component
that is saved, trained and averaged together with the UNet.

Letters: B batch, N_i VLM image tokens, T VLM text states, N_t text states kept, D VLM width, C cross-attention width.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class LegoProjector(ModelMixin, ConfigMixin):
    """Projects VLM embeddings to cross-attention width and assembles the condition sequence.

    The defaults are the released sizes: 77 + 256 + 77 = 410 tokens of width 768 from a 5120-wide VLM.

    Args:
        vlm_dim: D, width of the VLM's embeddings.
        cross_attention_dim: C, width of the UNet's cross-attention and of the text encoder.
        num_image_tokens: N_i, image tokens of one frame.
        num_text_tokens: N_t, to which the VLM's text states are cut or zero-padded *before* the projection. The
            padding rows are not masked: they become the projection's bias, as in the release.
        num_layers, num_heads, feed_forward_dim, dropout: of the text mixer, pre-norm encoder layers with ReLU and no
            final norm. Dropout is active in training mode only.
        vlm_id: of the VLM that it was trained with (`lego_pipeline.enhance.vlm_id`), or None if unknown.

    Source: paper section 3.3 (sigma -> `image_projection`, mu -> `text_projection`, pi -> `text_mixer`); upstream keys
    `projection_img`, `projection_txt`, `self_attn_mix`.
    """

    @register_to_config
    def __init__(
        self,
        vlm_dim: int = 5120,
        cross_attention_dim: int = 768,
        num_image_tokens: int = 256,
        num_text_tokens: int = 77,
        num_layers: int = 2,
        num_heads: int = 8,
        feed_forward_dim: int = 2048,
        dropout: float = 0.1,
        vlm_id: str | None = None,
    ):
        super().__init__()
        self.image_projection = nn.Linear(vlm_dim, cross_attention_dim)
        self.text_projection = nn.Linear(vlm_dim, cross_attention_dim)
        layer = nn.TransformerEncoderLayer(
            cross_attention_dim, num_heads, feed_forward_dim, dropout, batch_first=True, norm_first=True
        )
        self.text_mixer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As `ModelMixin.enable_group_offload`, with the whole projector as one group.

        Torch's attention reads the weights of its output layer without calling it, so that layer can't wait for a call
        of its own, as `offload_type="leaf_level"` would have it.

        Args:
            *args, **kwargs: of `ModelMixin.enable_group_offload`; `offload_type` and `num_blocks_per_group` have no
                effect.
        """
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        given.update(offload_type="block_level", num_blocks_per_group=1)
        super().enable_group_offload(**given)

    def forward(
        self,
        prompt_embeds: torch.Tensor,
        image_embeds: torch.Tensor | None = None,
        text_embeds: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Condition sequence of a batch.

        Args:
            prompt_embeds: (B, 77, C) float, last hidden state of the text encoder for the descriptions.
            image_embeds: (B, N_i, D) float, the VLM's image embeddings, or None for zeros *after* the projection.
            text_embeds: (B, T, D) float or B tensors (T_b, D), the VLM's text states, or None likewise.

        Returns:
            (B, 77 + N_i + N_t, C) float.

        Raises:
            ValueError: a size differs from the projector's config.
        """
        image, text = self.null_parts(prompt_embeds)
        if image_embeds is not None:
            expected = (len(prompt_embeds), self.config["num_image_tokens"], self.config["vlm_dim"])
            if tuple(image_embeds.shape) != expected:
                raise ValueError(
                    f"`image_embeds` must be {expected}, got {tuple(image_embeds.shape)}; "
                    "use the VLM that this projector was trained with."
                )
            image = self.image_projection(image_embeds)
        if text_embeds is not None:
            if len(text_embeds) != len(prompt_embeds):
                raise ValueError(f"`text_embeds` must have {len(prompt_embeds)} samples, got {len(text_embeds)}.")
            padded = torch.stack([self.fit_text(states) for states in text_embeds])  # (B, N_t, D)
            text = self.text_mixer(self.text_projection(padded))
        return torch.cat([prompt_embeds, image, text], dim=1)

    def fit_text(self, states: torch.Tensor) -> torch.Tensor:
        """Cuts or zero-pads text states (T, D) to (N_t, D); the zeros stand before the projection."""
        if states.ndim != 2 or states.shape[1] != self.config["vlm_dim"]:
            raise ValueError(
                f"`text_embeds` must be (T, {self.config['vlm_dim']}) per sample, got {tuple(states.shape)}; "
                "use the VLM that this projector was trained with."
            )
        kept = states[: self.config["num_text_tokens"]]
        return nn.functional.pad(kept, (0, 0, 0, self.config["num_text_tokens"] - len(kept)))

    def null_parts(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros (B, N_i, C) and (B, N_t, C), standing where the projected VLM embeddings would."""
        batch, _, width = prompt_embeds.shape
        if width != self.config["cross_attention_dim"]:
            raise ValueError(
                f"`prompt_embeds` must have width {self.config['cross_attention_dim']}, got {width}; "
                "use the text encoder that this projector was trained with."
            )
        return (
            prompt_embeds.new_zeros(batch, self.config["num_image_tokens"], width),
            prompt_embeds.new_zeros(batch, self.config["num_text_tokens"], width),
        )

    def null_condition(self, null_prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Null sequence ``[psi("") ; zeros ; zeros]``, zeros after the projections.

        Args:
            null_prompt_embeds: (B, 77, C) float, the text encoder's last hidden state for the empty string.

        Returns:
            (B, 77 + N_i + N_t, C) float.
        """
        return torch.cat([null_prompt_embeds, *self.null_parts(null_prompt_embeds)], dim=1)
