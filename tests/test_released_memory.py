"""The released sizes that the memory table is computed from."""

import pytest

from benchmarks import released_memory
from lego_pipeline.memory import GIGABYTE


@pytest.fixture(scope="module")
def rows() -> dict[str, float]:
    return released_memory.main(released_memory.MemoryConfig())


def test_the_diffusion_model_has_the_sizes_of_the_released_checkpoint() -> None:
    counts = {name: released_memory.count(module) for name, module in released_memory.build_diffusion().items()}
    projector = 2 * 3_932_928 + 11_027_968
    text = 123_060_557 - 77  # without the positions, a buffer
    assert counts == {"unet": 859_532_484, "vae": 83_653_863, "text_encoder": text, "projector": projector}


def test_the_vlm_is_llama_2_13b_with_its_vision_tower_and_projector() -> None:
    vlm = released_memory.build_vlm()
    language = released_memory.count(vlm.model.language_model) + released_memory.count(vlm.lm_head)
    assert language == 13_015_864_320 + 2 * 5120  # the row of <image>, in and out
    assert released_memory.count(vlm.model.multi_modal_projector) == 5120 * (1024 + 1) + 5120 * (5120 + 1)


def test_quantization_is_of_the_language_models_linear_layers(rows: dict[str, float]) -> None:
    linear, scales = 40 * (4 * 5120**2 + 3 * 5120 * 13824), 40 * (4 * 5120 + 2 * 13824 + 5120)
    in_bfloat16, in_int8, in_nf4 = (rows[f"VLM, weights in {name}"] for name in released_memory.PRECISIONS)
    others = in_bfloat16 - 2 * linear
    assert in_int8 == others + linear + 4 * scales
    assert in_nf4 == pytest.approx(others + linear * 4.127 / 8)
    assert [round(size / GIGABYTE, 1) for size in (in_bfloat16, in_int8, in_nf4)] == [26.7, 14.0, 7.9]


def test_keys_and_values_take_what_the_layers_keep(rows: dict[str, float]) -> None:
    [size] = [size for name, size in rows.items() if "keys and values" in name]
    assert size == 2 * 40 * 5120 * (80 + 256 + 1024) * 2
