"""Sharpness and similarity, on frames of the embedded kitchen: the settled bounds part what they should."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageFilter
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.siglip.configuration_siglip import SiglipConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipModel

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.curation.frames import Rules
from lego_pipeline.curation.measures import difference, grey, sharpness
from lego_pipeline.curation.similarity import COLOUR_BAND, colour_histogram, colour_similarity, load_similarity
from lego_pipeline.data.manifest import read_manifest

Pair = tuple[PIL.Image.Image, PIL.Image.Image]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [tuple(row[f"image_{k}"].convert("RGB") for k in (0, 1)) for row in read_manifest(FRAMES)]


def test_sharpness_has_a_hand_computed_value() -> None:
    values = np.zeros((5, 5), np.float32)
    values[2, 2] = 25  # variance 24; the Laplacian of the inner 3 x 3 is -100 in the middle, 25 on four sides
    assert sharpness(values) == pytest.approx((100**2 + 4 * 25**2) / 9 / 24)
    assert sharpness(np.full((5, 5), 7, np.float32)) == 0.0


def test_sharpness_does_not_depend_on_contrast_and_exposure(pairs: list[Pair]) -> None:
    values = grey(pairs[0][0])
    assert sharpness(0.3 * values + 20) == pytest.approx(sharpness(values), rel=1e-3)


def test_the_floor_of_sharpness_parts_sharp_frames_from_blurred_ones(pairs: list[Pair]) -> None:
    floor = Rules().min_sharpness
    for frame, _ in pairs:
        assert sharpness(grey(frame)) > 3 * floor
        assert sharpness(grey(frame.filter(ImageFilter.GaussianBlur(2)))) < floor


def test_grey_values_are_averaged_to_a_height() -> None:
    frame = PIL.Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((256, 400))).astype(np.uint8))
    values = grey(frame)
    assert values.shape == (256, 400)
    assert values[64].tolist() == [0] * 200 + [255] * 200
    assert difference(values, values + 3) == 3
    assert difference(values, values[:4]) == float("inf")


def test_the_settled_band_keeps_pairs_and_drops_still_ones_and_half_of_those_of_other_kitchens(
    pairs: list[Pair],
) -> None:
    low, high = COLOUR_BAND
    own = [colour_similarity(*pair) for pair in pairs]
    assert min(own) > low
    assert sum(value <= high for value in own) >= 60  # a bowl put on a counter before a head that keeps still
    noise = np.random.default_rng(0).integers(-2, 3, (128, 128, 3))
    for frame, _ in pairs[:16]:
        moved = np.roll(np.clip(np.asarray(frame) + noise, 0, 255).astype(np.uint8), 2, 1)
        assert colour_similarity(frame, PIL.Image.fromarray(moved)) > high
    others = [colour_similarity(pairs[i][0], pairs[(i + 7) % 64][1]) for i in range(64)]
    assert sum(value < low for value in others) >= 0.4 * len(others)


def test_colours_are_shared_between_the_nearest_nodes() -> None:
    frame = PIL.Image.new("RGB", (64, 64), (255, 0, 0))
    assert colour_histogram(frame)[7 * 64] == pytest.approx(1.0)
    assert colour_similarity(frame, frame) == pytest.approx(1.0)
    assert colour_similarity(frame, PIL.Image.new("RGB", (64, 64), (0, 0, 255))) == 0.0
    near = colour_similarity(frame, PIL.Image.new("RGB", (64, 64), (237, 0, 0)))
    assert 0.5 < near < 0.9  # half a node away


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny encoder of a kind with random weights."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            if kind == "clip":
                vision = layers | {"image_size": 16, "patch_size": 8}
                config = CLIPConfig(text_config=layers | {"vocab_size": 9}, vision_config=vision, projection_dim=12)
                CLIPModel(config).save_pretrained(folder)
            elif kind == "siglip":
                vision = layers | {"image_size": 16, "patch_size": 8}
                config = SiglipConfig(text_config=layers | {"vocab_size": 9}, vision_config=vision)
                SiglipModel(config).save_pretrained(folder)
            else:
                layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
                Dinov2Model(Dinov2Config(image_size=16, patch_size=8, **layers)).save_pretrained(folder)
        size = {"height": 16, "width": 16}
        if kind == "siglip":
            SiglipImageProcessorPil(size=size).save_pretrained(folder)
        else:
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
        return folder

    return make


def test_clip_is_compared_by_its_projected_embeddings_in_the_band_of_the_paper(
    encoder: Callable[[str], Path], pairs: list[Pair]
) -> None:
    folder = encoder("clip")
    similarity = load_similarity(folder)
    assert similarity.band == (0.81, 0.97)
    assert similarity.name.startswith("clip ")
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        states = model.vision_model(processor(list(pairs[0]), return_tensors="pt")["pixel_values"]).pooler_output
        first, second = model.visual_projection(states)
    expected = float(first @ second / first.norm() / second.norm())
    assert similarity(*pairs[0]) == pytest.approx(expected, abs=1e-4)
    assert similarity(pairs[0][0], pairs[0][0]) == 1.0


def test_another_encoder_needs_a_band_of_its_own(encoder: Callable[[str], Path], pairs: list[Pair]) -> None:
    folder = encoder("dinov2")
    with pytest.raises(ValueError, match="`band` must be given for an encoder of type dinov2"):
        load_similarity(folder)
    similarity = load_similarity(folder, (0.2, 0.9))
    assert similarity.band == (0.2, 0.9)
    assert -1 <= similarity(*pairs[0]) < 1


def test_siglip_is_compared_by_its_pooled_embeddings(encoder: Callable[[str], Path], pairs: list[Pair]) -> None:
    folder = encoder("siglip")
    with pytest.raises(ValueError, match="`band` must be given for an encoder of type siglip"):
        load_similarity(folder)
    similarity = load_similarity(folder, (0.2, 0.9))
    model, processor = SiglipModel.from_pretrained(folder), SiglipImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        first, second = model.vision_model(processor(list(pairs[0]), return_tensors="pt")["pixel_values"])[1]
    expected = float(first @ second / first.norm() / second.norm())
    assert similarity(*pairs[0]) == pytest.approx(expected, abs=1e-4)


def test_an_encoder_computes_in_single_precision_whatever_its_file_holds(
    encoder: Callable[[str], Path], pairs: list[Pair]
) -> None:
    folder = encoder("clip")
    CLIPModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    model, processor = CLIPModel.from_pretrained(folder).float(), CLIPImageProcessorPil.from_pretrained(folder)
    similarity = load_similarity(folder)
    for pair in pairs[:8]:
        with torch.no_grad():
            embeds = model.get_image_features(**processor(list(pair), return_tensors="pt")).pooler_output
        expected = torch.nn.functional.cosine_similarity(embeds[0], embeds[1], dim=0)
        assert similarity(*pair) == pytest.approx(float(expected), abs=6e-5)  # of rounding to 4 digits


def test_weights_that_are_cut_off_are_named(encoder: Callable[[str], Path]) -> None:
    weights = encoder("dinov2") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors` must have \d+ bytes by its header"):
        load_similarity(weights.parent, (0.2, 0.9))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`encoder` must be a folder with a model and its image processor"):
        load_similarity(tmp_path)
    with pytest.raises(ValueError, match="`band` must be two rising numbers from -1 to 1, got"):
        load_similarity(None, (0.9, 0.1))
