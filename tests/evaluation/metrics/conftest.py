"""Small networks with random weights in the layouts of the real ones, in one folder under their usual names."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
)

from lego_pipeline.evaluation.egovlp import SpaceTimeTransformer, TextTower, VideoTower
from lego_pipeline.evaluation.metrics.base import Frame, Sample
from tests.conftest import tiny_clip_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "the", "hand", "open", "cut", "drawer",
         "take", "cup", "person", "turn", "on", "tap", "fork", "plate", "knife", "left", "right")  # fmt: skip
BLIP_BEGIN = len(WORDS)  # as [DEC] stands behind BERT's words
EGOVLP_SIZES = {"size": 32, "patch": 16, "dim": 64, "depth": 2, "num_heads": 1, "hidden": 96, "num_frames": 3}


class ConfigParser:
    """Stands for an object of another program in the released EgoVLP files; reading must not make one."""


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EgoVLP, DistilBERT, CLIP, BLIP and the backbone of LPIPS; Inception is too large, see `test_fid.py`."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_distilbert(folder / "distilbert-base-uncased")
    save_egovlp(folder / "egovlp.pth", folder / "distilbert-base-uncased")
    save_clip(folder / "clip-vit-large-patch14")
    for name, width in (("base", 64), ("large", 128)):
        tiny_blip(width).save_pretrained(folder / f"blip-image-captioning-{name}")
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1().state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    return folder


def save_distilbert(folder: Path) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    DistilBertConfig(vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=48).save_pretrained(folder)


def save_egovlp(path: Path, distilbert: Path) -> None:
    """In the layout of the release: both towers below `module.`, beside an object of a foreign class."""
    video = VideoTower(SpaceTimeTransformer(**EGOVLP_SIZES), 16)
    text = TextTower(DistilBertModel(DistilBertConfig.from_pretrained(distilbert)), None, 16)
    for parameter in [*video.parameters(), *text.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"module.{name}": tensor for tower in (video, text) for name, tensor in tower.state_dict().items()}
    torch.save({"arch": "FrozenInTime", "state_dict": state, "config": ConfigParser()}, path)


def save_clip(folder: Path) -> None:
    tokenizer = tiny_clip_tokenizer(folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_blip(width: int) -> BlipForConditionalGeneration:
    text = {"vocab_size": len(WORDS) + 2, "hidden_size": 32, "encoder_hidden_size": width, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "bos_token_id": BLIP_BEGIN, "sep_token_id": WORDS.index("[SEP]"), "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that captions differ between pictures
    with torch.no_grad():
        model.text_decoder.cls.predictions.decoder.bias[[0, 1, 2, 4, -2, -1]] = -100  # and are of words
    return model.eval()


@pytest.fixture(scope="session")
def pictures() -> Callable[..., list[PIL.Image.Image]]:
    """Pictures of some sizes (width, height), smooth enough that resizing leaves something of them."""

    def make(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[PIL.Image.Image]:
        rng = np.random.default_rng(seed)
        small = [rng.integers(0, 256, (9, 12, 3), np.uint8) for _ in sizes]
        return [PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
                for pixels, size in zip(small, sizes, strict=True)]  # fmt: skip

    return make


SIZES = [(64, 48)] * 4 + [(48, 64), (80, 40)]


@pytest.fixture
def frames(pictures: Callable[..., list[PIL.Image.Image]]) -> tuple[list[Frame], list[Frame], list[Sample]]:
    """Generated frames, true frames and samples: six, of three sizes, the last generated one of another size."""
    starts = pictures(SIZES, seed=1)
    generated = [Frame(*pair) for pair in zip(pictures([*SIZES[:-1], (40, 40)], seed=2), starts, strict=True)]
    target = [Frame(*pair) for pair in zip(pictures(SIZES, seed=3), starts, strict=True)]
    actions = ("open drawer", "take cup", "turn on tap") * 2
    samples = [Sample(str(i), action, action.rsplit(" ", 1)[0], action.rsplit(" ", 1)[1], f"the hand {action}")
               for i, action in enumerate(actions)]  # fmt: skip
    return generated, target, samples
