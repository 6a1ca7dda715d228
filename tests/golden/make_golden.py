"""Makes the arrays of this folder: `python tests/golden/make_golden.py` from the root of the repository.

They are made by this package's own code, after it was compared with the released code's arrays (`pytest -k parity`),
and keep its numbers from changing unnoticed where those arrays aren't at hand. Run it again only when a change is
meant to alter numbers, and say so in CHANGELOG.md.
"""

from pathlib import Path

import numpy as np
import torch

from lego_pipeline import parity
from lego_pipeline.evaluation.egovlp import SpaceTimeTransformer, VideoTower, divided_attention
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.guidance import PASSES, combine
from lego_pipeline.projector import LegoProjector
from lego_pipeline.scheduler import LegoEulerAncestralScheduler
from lego_pipeline.vlm.chat import SampleByGumbelNoise

FOLDER = Path(__file__).parent


def projector_arrays() -> dict[str, np.ndarray]:
    """A small projector: weights, inputs with a short and a long answer, condition and null condition."""
    torch.manual_seed(0)
    sizes = {"vlm_dim": 12, "cross_attention_dim": 8, "num_image_tokens": 3, "num_text_tokens": 5}
    projector = LegoProjector(**sizes, num_layers=2, num_heads=2, feed_forward_dim=16).eval()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # norms and biases too, which start at one and zero
    tensors = {
        "prompt_embeds": torch.randn(2, 7, 8),
        "null_prompt_embeds": torch.randn(1, 7, 8),
        "image_embeds": torch.randn(2, 3, 12),
        "text_embeds_0": torch.randn(2, 12),
        "text_embeds_1": torch.randn(9, 12),
    }
    with torch.no_grad():
        texts = [tensors["text_embeds_0"], tensors["text_embeds_1"]]
        tensors["condition"] = projector(tensors["prompt_embeds"], tensors["image_embeds"], texts)
        tensors["null_condition"] = projector.null_condition(tensors["null_prompt_embeds"])
    tensors |= {f"weights.{name}": tensor for name, tensor in projector.state_dict().items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()} | {
        name: np.array(n) for name, n in sizes.items()
    }


def sampling_arrays() -> dict[str, np.ndarray]:
    """Scores of three rows and the tokens that seeds 0, 1 and 2 choose in four steps at temperature 0.7, top 5."""
    scores = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    sample = SampleByGumbelNoise(generators, temperature=0.7, top_k=5)
    tokens = torch.stack([sample(torch.zeros(3, 1, dtype=torch.long), step).argmax(-1) for step in scores])
    return {"scores": scores.numpy(), "tokens": tokens.numpy()}


def sampler_arrays() -> dict[str, np.ndarray]:
    """Noise levels, a trajectory of 7 steps with a stand-in for the UNet, and the picture of the last latent."""
    scheduler = LegoEulerAncestralScheduler()
    arrays: dict[str, torch.Tensor] = {}
    for steps in (20, 7):
        scheduler.set_timesteps(steps)
        arrays |= {f"sigmas_{steps}": scheduler.sigmas, f"timesteps_{steps}": scheduler.timesteps}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    latents, before = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        before.append(latents)
        predictions = [torch.tanh(scheduler.scale_model_input(latents, t) + shift) for shift in (0.1, 0.05, 0.0)]
        guided = combine(torch.cat(predictions), PASSES, 7.5, 1.5)
        latents = scheduler.step(guided, t, latents, generator=generator).prev_sample
    picture = parity.released_picture(latents[0], 1440, 1080)
    arrays |= {"noise": noise, "before_each_step": torch.stack(before), "final": latents}
    return {name: tensor.numpy() for name, tensor in arrays.items()} | {"picture": np.array(picture)}


def egovlp_arrays(weights: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """A small video tower (two blocks, three frames of four places) on two clips, and both views of a picture.

    Args:
        weights: of the tower by name; None draws them.
    """
    torch.manual_seed(0)
    sizes = {"size": 16, "patch": 8, "dim": 12, "depth": 2, "num_heads": 2, "hidden": 20, "num_frames": 3}
    tower = VideoTower(SpaceTimeTransformer(**sizes), 6).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if weights is not None:
        tower.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(2, 3, 3, 16, 16, generator=generator)
    picture = torch.rand(1, 3, 24, 40, generator=generator)
    with torch.no_grad():
        tokens = torch.randn(1, 13, 12, generator=generator)
        tensors = {
            "features": tower(frames),
            "time": divided_attention(tower.video_model.blocks[0].timeattn, tokens, 3, "time"),
            "view": preprocess.centre_without_antialiasing(picture, 16),
            "whole": preprocess.whole_frame(picture, 16),
        }
    tensors |= {f"weights.{name}": tensor for name, tensor in tower.state_dict().items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


MAKERS = {
    "egovlp": egovlp_arrays,
    "projector": projector_arrays,
    "sampling": sampling_arrays,
    "sampler": sampler_arrays,
}

if __name__ == "__main__":
    for name, arrays in {name: make() for name, make in MAKERS.items()}.items():
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays, torch_version=np.array(torch.__version__))
