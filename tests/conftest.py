"""A tiny LegoPipeline of real classes with random weights, for every test that runs one.

Everything is made by code: no network, no file of the repository. Frames are 32 pixels wide, the VAE has factor 4 and
6 latent channels (neither 8 nor 4 on purpose, so that a hard-coded size shows). `tiny_pipeline` is a fresh copy for
each test, made from components that are built once per session.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.projector import LegoProjector

RESOLUTION = 32  # pixels
VLM_IMAGE_SIZE, VLM_PATCH_SIZE = 16, 8  # pixels; 4 image tokens
VLM_DIM = 32
CROSS_ATTENTION_DIM = 32
NUM_TEXT_TOKENS = 6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
QWEN_TOKENS += ["<|video_pad|>"]
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP tokenizer without merges: every byte is a token, so a text of 76 letters is too long."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CROSS_ATTENTION_DIM,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_vlm_processor() -> LlavaProcessor:
    """Tokenizer of printable ASCII characters (so that random weights write text), CLIP images of 16 pixels."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # the last two are a byte-level space and line break
    backend = Tokenizer(BPE({token: i for i, token in enumerate(["<s>", "</s>", "<image>", *letters])}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": VLM_IMAGE_SIZE}, crop_size={"height": VLM_IMAGE_SIZE, "width": VLM_IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=VLM_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_vlm(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=VLM_IMAGE_SIZE,
        patch_size=VLM_PATCH_SIZE,
        projection_dim=16,
    )
    text_config = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=VLM_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=2, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def tiny_qwen_processor() -> Qwen3VLProcessor:
    """As `tiny_vlm_processor` for Qwen3-VL: every frame becomes 64 pixels wide and high, 4 image tokens."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    backend = Tokenizer(BPE({token: i for i, token in enumerate([*QWEN_TOKENS, *letters])}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        | {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    image_processor = Qwen2VLImageProcessorPil(size=size, patch_size=16, merge_size=2)
    return Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN_CHAT_TEMPLATE)


def tiny_qwen(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with two deep-stack layers, random weights from seed 0, global generator untouched."""
    vision_config = Qwen3VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=VLM_DIM,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    text_config = Qwen3VLTextConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=VLM_DIM,
        intermediate_size=48,
        num_hidden_layers=3,  # what is added after the last layer would reach no answer
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        | {"mrope_interleaved": True},
        pad_token_id=0,
        eos_token_id=2,
    )
    config = Qwen3VLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=QWEN_TOKENS.index("<|image_pad|>"),
        video_token_id=QWEN_TOKENS.index("<|video_pad|>"),
        vision_start_token_id=QWEN_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=QWEN_TOKENS.index("<|vision_end|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)


def build_components(folder: Path) -> dict[str, Any]:
    """All components of a LegoPipeline at tiny size, random weights from seed 0, global generator untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=6,
            norm_num_groups=4,
            sample_size=RESOLUTION,
            scaling_factor=0.7,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=12,
            out_channels=6,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=CROSS_ATTENTION_DIM,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        tokenizer = tiny_clip_tokenizer(folder / "tokenizer")
        processor = tiny_vlm_processor()
        components = {
            "vae": vae,
            "text_encoder": tiny_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
            ),
            "projector": LegoProjector(
                vlm_dim=VLM_DIM,
                cross_attention_dim=CROSS_ATTENTION_DIM,
                num_image_tokens=(VLM_IMAGE_SIZE // VLM_PATCH_SIZE) ** 2,
                num_text_tokens=NUM_TEXT_TOKENS,
                num_heads=4,
                feed_forward_dim=48,
            ),
            "vlm": tiny_vlm(processor),
            "vlm_processor": processor,
        }
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return components


@pytest.fixture(scope="session")
def tiny_components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Components of the session; copy before changing one."""
    return build_components(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_qwen_vlm() -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A second VLM family's model and processor; copy before changing one."""
    processor = tiny_qwen_processor()
    return tiny_qwen(processor), processor


@pytest.fixture(scope="session")
def make_tiny_pipeline(tiny_components: dict[str, Any]) -> Callable[..., LegoPipeline]:
    """Factory of fresh tiny pipelines; keyword arguments replace components or config values."""

    def make(**changes: Any) -> LegoPipeline:
        components = {
            name: changes.pop(name) if name in changes else copy.deepcopy(component)
            for name, component in tiny_components.items()
        }
        settings = {"resolution": RESOLUTION, "num_inference_steps": 3, "max_new_tokens": 5, **changes}
        pipe = LegoPipeline(**components, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def tiny_pipeline(make_tiny_pipeline: Callable[..., LegoPipeline]) -> LegoPipeline:
    """A fresh tiny pipeline with its VLM, three steps by default."""
    return make_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_folder(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline; copy it before changing a file."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def frame() -> PIL.Image.Image:
    """A frame of the tiny pipeline's own size with smooth random content."""
    return random_frame(RESOLUTION, RESOLUTION)


def random_frame(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth random picture; the same seed gives the same picture."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def make_frame() -> Callable[..., PIL.Image.Image]:
    """`make_frame(width, height, seed=0)`, see `random_frame`."""
    return random_frame


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Not for the session: playwright's event loop would be in the way of other tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not here: it is in the extra `dev`")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()
