"""What the released LEGO takes in memory, computed from its sizes alone: no weights are read, none are needed.

    python benchmarks/released_memory.py

The models are built without contents, at the sizes of the release as `lego convert` brings them to transformers and
diffusers: LLaVA on Llama-2-13B with CLIP ViT-L/14 at 224 pixels, and the diffusion model of Stable Diffusion 1.5 with
8 input channels. Counted are weights, and the keys and values that the VLM keeps of question, frame and answer. In 8
and 4 bit the linear layers of the language model are quantized, as bitsandbytes does it: int8 with a float32 scale for
each row, or NF4 with nested scales; vision tower, the VLM's projector, embeddings, norms and the last layer stay in
bfloat16. Not in it: activations of a running layer, and what CUDA takes for itself (1 to 2 GB). GB are 10^9 bytes.
"""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from lego_pipeline.config import parse_config
from lego_pipeline.memory import FOUR_BITS, GIGABYTE
from lego_pipeline.projector import LegoProjector

PRECISIONS = ("bfloat16", "8 bit", "4 bit")
HALF, SINGLE = 2, 4  # bytes of a number


@dataclass(kw_only=True)
class MemoryConfig:
    question_tokens: int = 80  # with the system text of the release's template
    answer_tokens: int = 1024  # the release's limit

    def __post_init__(self):
        if min(self.question_tokens, self.answer_tokens) < 1:
            raise ValueError("`question_tokens` and `answer_tokens` must be at least 1.")


def build_vlm() -> LlavaForConditionalGeneration:
    """The converted VLM on the meta device, its vocabulary one longer for `<image>`."""
    text = LlamaConfig(
        vocab_size=32001,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        image_seq_length=256,
        projector_hidden_act="linear",
        vision_feature_layer=-2,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def build_diffusion() -> dict[str, nn.Module]:
    """The converted diffusion model on the meta device."""
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    levels = (128, 256, 512, 512)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(in_channels=8, cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                block_out_channels=levels,
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * len(levels),
                up_block_types=("UpDecoderBlock2D",) * len(levels),
            ),
            "text_encoder": CLIPTextModel(clip),
            "projector": LegoProjector(),
        }


def count(module: nn.Module) -> int:
    """Numbers in a module's weights."""
    return sum(weight.numel() for weight in module.parameters())


def weight_bytes(vlm: LlavaForConditionalGeneration, precision: str) -> float:
    """Bytes of a VLM's weights in one of `PRECISIONS`."""
    total = count(vlm) * HALF
    if precision == "bfloat16":
        return total
    for module in vlm.model.language_model.modules():
        if isinstance(module, nn.Linear):
            numbers, rows = module.weight.numel(), module.weight.shape[0]
            total += (numbers + rows * SINGLE if precision == "8 bit" else numbers * FOUR_BITS) - numbers * HALF
    return total


def key_value_bytes(vlm: LlavaForConditionalGeneration, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in half precision."""
    text = vlm.config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * HALF


def main(config: MemoryConfig) -> dict[str, float]:
    """Prints the table; returns bytes by row."""
    vlm, diffusion = build_vlm(), build_diffusion()
    tokens = config.question_tokens + vlm.config.image_seq_length + config.answer_tokens
    cache, numbers = key_value_bytes(vlm, tokens), sum(map(count, diffusion.values()))
    rows = {f"VLM, weights in {precision}": weight_bytes(vlm, precision) for precision in PRECISIONS}
    rows[f"VLM, keys and values of {tokens} tokens"] = cache
    rows |= {"diffusion model in half precision": numbers * HALF, "diffusion model in float32": numbers * SINGLE}
    rows |= {
        f"all, VLM in {precision}, the rest in half precision": rows[f"VLM, weights in {precision}"]
        + cache
        + numbers * HALF
        for precision in PRECISIONS
    }
    print(f"{count(vlm):,} numbers in the VLM, {numbers:,} in the diffusion model; computed, not measured")
    print("\n| | GB |\n|---|---|")
    for name, size in rows.items():
        print(f"| {name} | {size / GIGABYTE:.1f} |")
    return rows


if __name__ == "__main__":
    main(parse_config(MemoryConfig, __doc__))
