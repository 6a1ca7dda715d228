"""Keeping the scene: pixels of the input where the latents did not change, at any output size."""

from collections.abc import Callable

import pytest
import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.scene import changed_share, keep_scene_pixels


def test_the_share_grows_from_0_to_1_between_the_thresholds():
    before = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    spread = before.std()
    after = before.clone()
    for cell, distance in enumerate((0.0, 0.3, 0.45, 0.9)):  # root mean square over the channels
        after[0, :, cell // 2, cell % 2] += distance * spread
    share = changed_share(after, before, (0.3, 0.6))
    torch.testing.assert_close(share, torch.tensor([[[[0.0, 0.0], [0.5, 1.0]]]]), atol=1e-5, rtol=0)


def test_a_sample_s_share_does_not_depend_on_its_batch():
    before, after = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    together = changed_share(after, before, (0.5, 2.0))
    alone = torch.cat([changed_share(after[i : i + 1], before[i : i + 1], (0.5, 2.0)) for i in range(3)])
    assert torch.equal(together, alone)
    assert 0 < together.mean() < 1


def test_an_image_of_no_range_divides_by_no_zero():
    assert changed_share(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), (0.3, 0.6)).eq(0).all()


def test_pixels_fade_from_the_frame_into_the_image():
    image, frame = torch.ones(3, 16, 32), torch.zeros(3, 16, 32)
    kept = keep_scene_pixels(image, frame, torch.tensor([[[0.0, 1.0]]]))
    assert kept[:, :, 0].eq(0).all() and kept[:, :, -1].eq(1).all()
    row = kept[0, 0]
    assert (row[1:] >= row[:-1]).all() and ((row > 0) & (row < 1)).any()  # no seam


@pytest.mark.parametrize("size", [(32, 32), (36, 48)])
@pytest.mark.parametrize("output_type", ["pt", "pil"])
def test_thresholds_out_of_reach_give_the_frame_back_at_its_own_size(
    size: tuple[int, int], output_type: str, tiny_pipeline: LegoPipeline, make_frame: Callable
):
    frame = make_frame(size[1], size[0], 0)

    def call(**settings):
        generator = torch.Generator().manual_seed(0)
        images = tiny_pipeline(
            frame,
            action="open drawer",
            num_inference_steps=1,
            generator=generator,
            output_type=output_type,
            **settings,
        ).images
        return images[0]

    kept, decoded = call(keep_scene=(1e5, 1e6)), call(keep_scene=False)
    if output_type == "pil":
        assert kept.size == frame.size
        assert kept.tobytes() == frame.tobytes() != decoded.tobytes()
    else:
        assert kept.shape == (3, *size)
        assert not torch.allclose(kept, decoded)


def test_the_checkpoint_has_the_default_and_false_overrules_it(make_tiny_pipeline: Callable, make_frame: Callable):
    pipeline = make_tiny_pipeline()
    frame = make_frame(32, 32, 0)
    plain = pipeline(frame, action="open drawer", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    pipeline.register_to_config(keep_scene=[1e5, 1e6])
    pictures = {
        name: pipeline(
            frame,
            action="open drawer",
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
            keep_scene=value,
        ).images[0]
        for name, value in {"default": None, "off": False}.items()
    }
    assert pictures["default"].tobytes() == frame.tobytes()
    assert pictures["off"].tobytes() == plain.images[0].tobytes()


@pytest.mark.parametrize("value", [True, (0.6, 0.3), (0.3,), (-1, 1), "0.3", (None, 1)])
def test_other_thresholds_are_refused(value, tiny_pipeline: LegoPipeline, make_frame: Callable):
    with pytest.raises(ValueError, match="`keep_scene` must be two thresholds of change"):
        tiny_pipeline(make_frame(32, 32, 0), action="open drawer", keep_scene=value)
