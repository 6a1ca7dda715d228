"""ProxEdit: the inversion by hand, the frame back without guidance, the proximal operators on numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import images
from lego_pipeline.baselines.proxedit import ProxEdit, proximal


@pytest.fixture(scope="module")
def make(text_to_image: Path) -> Any:
    """Factory of baselines that share one loaded pipeline."""
    loaded = ProxEdit()
    loaded.load(str(text_to_image), torch.device("cpu"), torch.float32)
    with torch.no_grad():  # a random prediction of full size is so rough that no inversion could follow it
        for weight in loaded.pipeline.unet.conv_out.parameters():
            weight.mul_(0.01)

    def make_one(**settings: Any) -> ProxEdit:
        baseline = ProxEdit(**{"num_inference_steps": 6, **settings})
        baseline.pipeline = loaded.pipeline
        return baseline

    return make_one


@torch.no_grad()
def path_of(baseline: ProxEdit, frame: PIL.Image.Image) -> list[torch.Tensor]:
    latents = baseline.encode(images.to_model_input(frame, 32, 32)[None])
    return baseline.invert(latents, baseline._encode_text([""]))


@torch.no_grad()
def drawn(baseline: ProxEdit, frame: PIL.Image.Image, text: str = "open drawer") -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that it ends with, and the frame's own."""
    path = path_of(baseline, frame)
    source, target = (baseline._encode_text([given]) for given in ("", text))
    return baseline.sample(path, source, target), path[0]


def relative_error(latents: torch.Tensor, own: torch.Tensor) -> float:
    return float((latents - own).norm() / own.norm())


@torch.no_grad()
def test_the_inversion_is_ddim_s_formula_backwards(make: Any, frame: PIL.Image.Image) -> None:
    baseline = make(num_inference_steps=5)
    path = path_of(baseline, frame)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    products = np.cumprod(1 - betas)
    states = baseline._encode_text([""])
    z = path[0].double()
    for k, t in enumerate(range(1, 1000, 200)):
        low, high = products[max(t - 200, 0)], products[t]  # the first step comes from level 0
        e = baseline.pipeline.unet(z.float(), t, encoder_hidden_states=states).sample.double()
        z = high**0.5 * (z - (1 - low) ** 0.5 * e) / low**0.5 + (1 - high) ** 0.5 * e
        assert torch.allclose(path[k + 1].double(), z, atol=1e-4)
    assert len(path) == 6


def test_without_guidance_the_frame_comes_back_the_better_the_more_steps(
    make: Any, frame: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exact prediction where clean latents are Gaussian with variance 2; a random network isn't smooth enough to
    # show an order of convergence.
    products = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

    def predict(self: ProxEdit, z: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return (1 - products[t]) ** 0.5 * z / (2 * products[t] + 1 - products[t])

    monkeypatch.setattr(ProxEdit, "_predict", predict)
    plain = {"guidance_scale": 0.0, "inversion_guidance": 0.0}
    errors = [relative_error(*drawn(make(num_inference_steps=n, **plain), frame)) for n in (25, 50, 100, 200)]
    for error, finer in zip(errors, errors[1:], strict=False):
        assert 1.6 < error / finer < 2.4  # first order in the step
    assert errors[-1] < 0.02


def test_the_picture_without_guidance_is_nearly_the_frame_through_the_vae(make: Any, frame: PIL.Image.Image) -> None:
    baseline = make(num_inference_steps=10, guidance_scale=0.0)
    [picture] = baseline.draw([frame], ["open drawer"], [torch.Generator()])
    with torch.no_grad():
        expected = baseline.decode(baseline.encode(images.to_model_input(frame, 32, 32)[None]))
    difference = np.asarray(picture).astype(int) - np.asarray(images.to_pil(images.from_model_output(expected)[0]))
    assert float(np.abs(difference).mean()) < 3


def test_where_nothing_is_above_the_threshold_the_inversion_guidance_restores_all(
    make: Any, frame: PIL.Image.Image
) -> None:
    restored = drawn(make(quantile=1.0, dilation=0), frame)
    assert relative_error(*restored) < 1e-6
    assert relative_error(*drawn(make(quantile=1.0, inversion_guidance=0.0), frame)) > 1e-4


def test_guidance_moves_the_picture_and_proximal_guidance_less(make: Any, frame: PIL.Image.Image) -> None:
    plain = {"inversion_guidance": 0.0, "guidance_scale": 30.0}
    errors = [relative_error(*drawn(make(quantile=q, **plain), frame)) for q in (0.0, 0.7, 1.0)]
    assert errors[0] > errors[1] > errors[2]


def test_the_operators_on_numbers() -> None:
    difference = torch.tensor([0.0, 1.0, -2.0, 3.0, -4.0]).view(1, 1, 1, 5)
    hard, kept = proximal(difference, 0.5, "l0")  # the median of |d| is 2
    assert hard.flatten().tolist() == [0, 0, 0, 3, -4]
    assert kept.flatten().tolist() == [False, False, False, True, True]
    soft, _ = proximal(difference, 0.5, "l1")
    assert soft.flatten().tolist() == [0, 0, 0, 1, -2]
    assert proximal(difference, 0.0, "l0")[0].flatten().tolist() == difference.flatten().tolist()
    assert not proximal(difference, 1.0, "l0")[1].any()
    assert not proximal(torch.zeros(1, 1, 1, 5), 0.5, "l0")[1].any()


def test_every_sample_has_its_own_threshold() -> None:
    difference = torch.tensor([[1.0, 2.0], [10.0, 20.0]]).view(2, 1, 1, 2)
    assert proximal(difference, 0.5, "l0")[1].flatten().tolist() == [False, True, False, True]


def test_the_source_text_stands_where_guidance_has_the_empty_one(make: Any, frame: PIL.Image.Image) -> None:
    same = make(source_prompt="open drawer", inversion_guidance=0.0, guidance_scale=30.0, num_inference_steps=5)
    plain = make(source_prompt="open drawer", inversion_guidance=0.0, guidance_scale=0.0, num_inference_steps=5)
    first, second = (b.draw([frame], ["open drawer"], [torch.Generator()])[0] for b in (same, plain))
    assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1  # equal texts differ in nothing
