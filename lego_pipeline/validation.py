"""How good the averaged weights are in the course of training: the loss on held-out pairs, and pictures of some.

Noise and timesteps are fixed and nothing is dropped, so values of different steps can be compared; the released code
validated with free noise and dropped conditions.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from lego_pipeline.contact_sheet import Card, draw_contact_sheet
from lego_pipeline.data.pairs import VALIDATION_STEP, PairDataset, collate
from lego_pipeline.diffusion_step import Inputs, losses_of
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.training import seed_of


@contextmanager
def averaged(ema: EMAModel | None, parameters: Iterable[nn.Parameter], model: nn.Module) -> Generator[None]:
    """The model with its averaged weights, without dropout."""
    model.eval()
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema is not None:
        ema.restore(parameters)
    model.train()


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, inputs: Inputs, dataset: PairDataset) -> float:
    """Mean loss on held-out pairs with fixed noise and timesteps; the batches are split over the processes."""
    groups = dataset.groups()
    batches = []
    for group in sorted(set(groups)):
        members = [sample for sample in range(len(dataset)) if groups[sample] == group]
        batches += [members[start : start + 32] for start in range(0, len(members), 32)]
    totals = torch.zeros(2, device=accelerator.device)
    world = accelerator.num_processes
    for first in range(0, len(batches), world):
        number = first + accelerator.process_index
        # All processes call the model equally often, as split weights need it; what is too much doesn't count.
        samples = batches[min(number, len(batches) - 1)]
        losses = losses_of(model, inputs(collate([dataset[VALIDATION_STEP, sample] for sample in samples])))
        if number < len(batches):
            totals += torch.stack([losses.sum(), losses.new_tensor(len(samples))])
    total, count = accelerator.reduce(totals, "sum").tolist()
    return total / count


@torch.no_grad()
def draw_pictures(pipeline: LegoPipeline, inputs: Inputs, dataset: PairDataset, count: int, seed: int) -> Image.Image:
    """Contact sheet of the first held-out pairs: input, generated and true frame, always from the same noise."""
    cards = []
    for sample in range(min(count, len(dataset))):
        description, label = dataset.texts(sample)
        frames = [dataset.frame(sample, k) for k in (0, 1)]
        given: dict[str, Any] = {"description": label}
        if dataset.cache is not None and dataset.recipe is not None:
            given = {"enhancement": dataset.cache.enhancement(*dataset.embedding_keys(sample), dataset.recipe)}
        elif dataset.gives_frames:
            one = {"frame": frames[:1], "action": [label], "description": [description], "sample": [sample]}
            given = {"enhancement": inputs.enhance(one)}
        generator = torch.Generator().manual_seed(seed_of("picture", seed, sample))
        output = pipeline(frames[0], **given, generator=generator)
        generated: Any = output.images[0]
        shown = [("input", frames[0]), ("generated", generated), ("true", frames[1])]
        cards.append(Card(title=label, frames=shown, text=output.descriptions[0]))
    return draw_contact_sheet(cards)
