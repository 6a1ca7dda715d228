"""The kitchen checkpoint's parts before training: shapes, and initial weights that already know something.

Shapes (fixed for good once trained, see docs/kitchen.md for the measurements behind them): frames of
128 px, an `AutoencoderKL` of factor 16 with 48 latent channels, hence 8x8 latents, on which two cores train a UNet
several times faster than on 16x16.

Two initialisations save most of the training. Both use that `silu(x) - silu(-x) = x` and that a group norm whose
group holds one large constant channel is nearly linear, so that linear maps pass through standard classes unchanged:

- the VAE's encoder is the principal components of the frames' patches, level by level (nothing to train);
- the UNet copies the condition latent to its output, so that the untouched scene is there from the first step and
  training only learns where and what to change; a bias on both signs of a channel switches the copy off locally.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel, CLIPVisionModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from lego_pipeline.loading import write_bpe_files
from lego_pipeline.projector import LegoProjector

FRAME_SIZE = 128  # pixels
LATENT_CHANNELS = 48
CROSS_ATTENTION_DIM = 128
VLM_DIM = 192
PATCH_SIZE = 16  # of the vision tower, pixels
NUM_IMAGE_TOKENS = (FRAME_SIZE // PATCH_SIZE) ** 2
NUM_TEXT_TOKENS = 32
CONSTANT = 32.0  # of the channel that keeps a group norm linear
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% else %} ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_vae(frames: torch.Tensor) -> AutoencoderKL:
    """Autoencoder whose encoder holds the principal components of `frames` and whose decoder is untrained.

    Args:
        frames: (N, 3, 128, 128) float in [-1, 1], a few hundred.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(16, 32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=FRAME_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    set_principal_components(vae, frames)
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def set_principal_components(vae: AutoencoderKL, frames: torch.Tensor) -> None:
    """Writes the encoder's weights so that it projects patches on principal components, halving the grid per level."""
    encoder = vae.encoder
    blocks = [*encoder.down_blocks, encoder.mid_block]
    for resnet in [resnet for block in blocks for resnet in block.resnets]:
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
        if resnet.conv_shortcut is not None:
            _pass_channels(resnet.conv_shortcut)
    _pass_channels(encoder.conv_in)
    features, mean = frames, frames.mean((0, 2, 3))  # (N, channels, h, w); the mean is removed at the last level
    downsamplers = [block.downsamplers[0].conv for block in encoder.down_blocks[:-1]]
    for conv in downsamplers:
        patches = nn.functional.pixel_unshuffle(features, 2)  # (N, 4 channels, h/2, w/2), order (channel, dy, dx)
        rows = patches.permute(0, 2, 3, 1).flatten(0, 2)
        rows = rows - rows.mean(0)
        kept = LATENT_CHANNELS if conv is downsamplers[-1] else min(conv.out_channels, rows.shape[1])
        components = torch.linalg.eigh(rows.T.double() @ rows.double()).eigenvectors.flip(1)[:, :kept].float()
        components *= torch.where(components.sum(0) < 0, -1.0, 1.0)
        kernel = components.T.reshape(kept, -1, 2, 2)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.weight[:kept, : kernel.shape[1], :2, :2] = kernel
        features = torch.einsum("nchw,ck->nkhw", patches, components)
        mean = components.T @ mean.repeat_interleave(4)
    scale = features.std((0, 2, 3)).sqrt()  # halfway to unit variance: fine detail survives more of the noise
    matrix = downsamplers[-1].weight[:LATENT_CHANNELS] / scale[:, None, None, None]
    _make_linear(downsamplers[-1], encoder.conv_norm_out, encoder.conv_out, matrix, -mean / scale)
    encoder.conv_out.weight[LATENT_CHANNELS:] = 0
    encoder.conv_out.bias[LATENT_CHANNELS:] = -12.0  # log variance: the encoder adds no noise to speak of


def build_unet(grid: int = FRAME_SIZE // 16, channels: int = LATENT_CHANNELS) -> UNet2DConditionModel:
    """UNet for latents of `grid` x `grid` cells, with random weights; `set_copy` writes what it knows from the start.

    Args:
        grid: side of the latents.
        channels: of the latents; it takes twice as many, the noisy target's and the input frame's.
    """
    return UNet2DConditionModel(
        sample_size=grid,
        in_channels=2 * channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(160, 192),
        layers_per_block=1,
        cross_attention_dim=CROSS_ATTENTION_DIM,
        attention_head_dim=8,  # 8 heads at every level
    )


@torch.no_grad()
def set_copy(unet: UNet2DConditionModel, scaling_factor: float) -> None:
    """Writes a copy of the condition latent times `scaling_factor` into the UNet's outermost skip connection."""
    channels, width = LATENT_CHANNELS, unet.conv_in.out_channels
    block = unet.up_blocks[-1]
    unet.conv_in.weight[:channels] = 0
    unet.conv_in.bias[:channels] = 0
    unet.conv_in.weight[range(channels), range(channels, 2 * channels), 1, 1] = scaling_factor
    for module in [block.resnets[-1].conv2, block.attentions[-1].proj_out]:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    shortcut = block.resnets[-1].conv_shortcut
    skip = torch.zeros(channels, shortcut.in_channels, 1, 1)
    skip[:, -width : -width + channels, 0, 0] = torch.eye(channels)
    _make_linear(shortcut, unet.conv_norm_out, unet.conv_out, skip, torch.zeros(channels))


def _pass_channels(conv: nn.Conv2d) -> None:
    """The convolution hands its input channels on, as far as it has output channels for them."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    centre = conv.kernel_size[0] // 2
    channels = range(min(conv.in_channels, conv.out_channels))
    conv.weight[channels, channels, centre, centre] = 1


def _make_linear(conv: nn.Conv2d, norm: nn.GroupNorm, conv_out: nn.Conv2d, matrix: torch.Tensor, bias: torch.Tensor):
    """Makes ``conv_out(silu(norm(conv(x)))) = matrix * x + bias`` to within a percent.

    Each group of the norm holds both signs of some outputs and one large constant. Channels of groups that are not
    needed stay as they are.

    Args:
        conv: the last convolution before the norm.
        matrix: (K, in channels, kernel, kernel), K at most the number of outputs for which there are groups.
        bias: (K,).
    """
    size = norm.num_channels // norm.num_groups
    per_group = (size - 1) // 2
    outputs = len(matrix)
    conv_out.weight[:outputs] = 0
    conv_out.bias[:outputs] = 0
    for group in range(-(-outputs // per_group)):
        first = group * size
        rows = slice(first, first + size)
        conv.weight[rows] = 0
        conv.bias[rows] = 0
        conv.bias[first + size - 1] = CONSTANT
        norm.weight[rows] = CONSTANT * ((size - 1) / size**2) ** 0.5  # the group's deviation: one constant, else zeros
        norm.bias[rows] = CONSTANT / size  # and its mean
        for k, output in enumerate(range(group * per_group, min((group + 1) * per_group, outputs))):
            for sign in (1, -1):
                channel = first + 2 * k + (sign < 0)
                conv.weight[channel] = sign * matrix[output]
                conv.bias[channel] = sign * bias[output]
                conv_out.weight[output, channel, 1, 1] = sign


def build_scheduler() -> EulerDiscreteScheduler:
    """Euler over SD's noise schedule; the UNet predicts the clean latent."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="sample",
        timestep_spacing="linspace",
    )


def build_projector() -> LegoProjector:
    """Projector for 77 + 64 + 32 tokens of width 128."""
    return LegoProjector(
        vlm_dim=VLM_DIM,
        cross_attention_dim=CROSS_ATTENTION_DIM,
        num_image_tokens=NUM_IMAGE_TOKENS,
        num_text_tokens=NUM_TEXT_TOKENS,
        feed_forward_dim=512,
    )


def build_clip_tokenizer(corpus: Iterable[str], vocab_size: int = 1000) -> CLIPTokenizer:
    """CLIP tokenizer with a vocabulary of its own in CLIP's order: bytes, bytes ending a word, merges, start, end.

    The end token also pads; no special token has id 2, for which transformers pools text differently.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [f"{letter}</w>" for letter in letters]
    # As "special" tokens the letters get their numbers in this order; else those that end a word would be numbered in
    # the order of a hash table, ties between merges fall differently in every run, and a resumed run would misread.
    trainer = BpeTrainer(vocab_size=vocab_size - 2, end_of_word_suffix="</w>", special_tokens=letters)
    learner.train_from_iterator(corpus, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(merge) for merge in learned][: vocab_size - 2 - len(letters)]
    tokens = [*letters, *("".join(merge) for merge in merges), start, end]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`save_pretrained`, and the files of the older layout beside it."""
    tokenizer.save_pretrained(folder)
    write_bpe_files(folder)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Small CLIP; its text tower becomes the pipeline's, its vision tower the VLM's."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CROSS_ATTENTION_DIM,
        intermediate_size=4 * CROSS_ATTENTION_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=VLM_DIM,
        intermediate_size=4 * VLM_DIM,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def build_image_processor() -> CLIPImageProcessorPil:
    """Whole frame to 128 x 128, so that VLM and diffusion model see the same view."""
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    return CLIPImageProcessorPil(size=size, do_center_crop=False)


def build_vlm(
    corpus: Iterable[str], vision_tower: CLIPVisionModel
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """LLaVA of about 4 M parameters around a trained vision tower, language model untrained; and its processor."""
    learner = Tokenizer(BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(corpus, BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    processor = LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=VLM_DIM,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision_tower.config.to_dict(),
        text_config=language.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_IMAGE_TOKENS,
    )
    vlm = LlavaForConditionalGeneration(config)
    vlm.model.vision_tower.load_state_dict(vision_tower.state_dict())
    return vlm, processor
