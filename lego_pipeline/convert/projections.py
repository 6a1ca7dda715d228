"""Were the projections of a checkpoint ever trained? The released training code leaves them out of its optimiser.

PyTorch's defaults leave marks that training removes at once: biases of the attention exactly zero, norms exactly one
and zero, both layers of the mixer equal (the second is a copy of the first), weights uniform within a known bound.
Facts: `BolinLai/LEGO: stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`.
"""

import math
from collections.abc import Iterator, Mapping

import torch

SLACK = 1.004  # a bound rounded to bfloat16


def describe_projections(state: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """What the three projection modules of a checkpoint went through.

    Args:
        state: with their tensors under the names of the release.

    Returns:
        "random initialisation", "trained" or "partly changed", and a sentence with the reasons.
    """
    marks = dict(_marks(state))
    broken = [mark for mark, holds in marks.items() if not holds]
    if not broken:
        return "random initialisation", (
            f"The projections are at PyTorch's random initialisation, never trained: {len(marks)} of {len(marks)} "
            "marks of it hold (biases at zero, norms at one, equal layers, uniform within the bounds)."
        )
    if len(broken) == len(marks):
        return "trained", f"The projections were trained: none of {len(marks)} marks of random initialisation holds."
    return "partly changed", (
        f"The projections are not as PyTorch initialises them: {len(marks) - len(broken)} of {len(marks)} marks hold, "
        f"these don't: {', '.join(broken)}."
    )


def _marks(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, bool]]:
    for name in ("projection_img", "projection_txt"):
        bound = 1 / math.sqrt(state[f"{name}.weight"].shape[1])
        yield f"{name} within {bound:.5f}", _within(bound, state[f"{name}.weight"], state[f"{name}.bias"])
    mixer = {name: tensor for name, tensor in state.items() if name.startswith("self_attn_mix.layers.")}
    layers = sorted({name.split(".")[2] for name in mixer})
    for layer in layers:
        prefix = f"self_attn_mix.layers.{layer}."
        own = {name[len(prefix) :]: tensor for name, tensor in mixer.items() if name.startswith(prefix)}
        width, hidden = own["linear1.weight"].shape[1], own["linear2.weight"].shape[1]
        zeros = [
            tensor for name, tensor in own.items() if name in ("self_attn.in_proj_bias", "self_attn.out_proj.bias")
        ]
        zeros += [own["norm1.bias"], own["norm2.bias"]]
        bounds = {
            "self_attn.in_proj_weight": math.sqrt(6 / (4 * width)),
            "self_attn.out_proj.weight": 1 / math.sqrt(width),
            "linear1.weight": 1 / math.sqrt(width),
            "linear1.bias": 1 / math.sqrt(width),
            "linear2.weight": 1 / math.sqrt(hidden),
            "linear2.bias": 1 / math.sqrt(hidden),
        }
        yield f"layer {layer} biases at zero", all(bool((tensor == 0).all()) for tensor in zeros)
        yield f"layer {layer} norms at one", all(bool((own[f"norm{i}.weight"] == 1).all()) for i in (1, 2))
        yield (
            f"layer {layer} weights within their bounds",
            all(_within(bound, own[name]) for name, bound in bounds.items()),
        )
    for layer in layers[1:]:
        first, other = f"self_attn_mix.layers.{layers[0]}.", f"self_attn_mix.layers.{layer}."
        yield (
            f"layer {layer} equal to layer {layers[0]}",
            all(
                torch.equal(tensor, mixer[name.replace(first, other)])
                for name, tensor in mixer.items()
                if name.startswith(first)
            ),
        )


def _within(bound: float, *tensors: torch.Tensor) -> bool:
    return all(float(tensor.abs().max()) <= bound * SLACK for tensor in tensors)
