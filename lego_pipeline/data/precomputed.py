"""Latents and text encodings of a data set, computed once and kept in a `ShardStore`.

Letters: c latent channels, h, w latent size, C width of the text encoder's states.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lego_pipeline.data.pairs import PairDataset, Precomputed
from lego_pipeline.data.shards import ShardStore, model_key


def open_precomputed(
    folder: Path, vae: AutoencoderKL, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Precomputed:
    """The store in a folder, for what these models compute; every process writes shards of its own."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return Precomputed(
        store=ShardStore(folder, f"p{PartialState().process_index}"),
        vae_key=model_key(vae, config),
        text_key=model_key(text_encoder, vocabulary, tokenizer.model_max_length),
    )


@torch.no_grad()
def fill_latents(datasets: Sequence[PairDataset], vae: AutoencoderKL, batch_size: int = 8) -> None:
    """Computes the latents that the store lacks; processes share the work.

    A batch always holds the same frames, so a frame's latents don't depend on where an earlier run was killed.
    """
    places = {
        dataset.latents_key(sample, k): (dataset, sample, k)
        for dataset in datasets
        for sample in range(len(dataset))
        for k in (0, 1)
    }
    by_size = sorted(places.items(), key=lambda entry: entry[1][0].size_of(entry[1][1]))
    groups = [list(group) for _, group in groupby(by_size, lambda entry: entry[1][0].size_of(entry[1][1]))]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]

    def compute(batch: Sequence[tuple[PairDataset, int, int]]) -> list[dict[str, torch.Tensor]]:
        pixels = torch.stack([dataset.pixels(sample, k) for dataset, sample, k in batch])
        pixels = pixels.to(vae.device, vae.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        posterior = vae.encode(pixels).latent_dist
        parts = zip(posterior.mode().float(), posterior.std.float(), strict=True)
        return [{"mean": mean, "std": std} for mean, std in parts]

    _fill(datasets[0], batches, compute, "encode frames")


@torch.no_grad()
def fill_prompts(
    datasets: Sequence[PairDataset], encode_prompt: Callable[[list[str]], torch.Tensor], batch_size: int = 64
) -> None:
    """Computes the text encodings that the store lacks, as `fill_latents`; `encode_prompt` gives (B, 77, C)."""
    places: dict[str, tuple[PairDataset, int, int]] = {}
    for dataset in datasets:
        assert dataset.precomputed is not None
        for sample in range(len(dataset)):
            for kind, text in enumerate(dataset.texts(sample)):
                if text is not None and (kind == 0 or dataset.draws.vlm_dropout > 0):
                    places.setdefault(dataset.precomputed.prompt_key(text), (dataset, sample, kind))
    entries = list(places.items())

    def compute(batch: Sequence[tuple[PairDataset, int, int]]) -> list[dict[str, torch.Tensor]]:
        texts = [dataset.texts(sample)[kind] for dataset, sample, kind in batch]
        states = encode_prompt([text for text in texts if text is not None])
        return [{"states": states_of_one.float()} for states_of_one in states]

    batches = [entries[i : i + batch_size] for i in range(0, len(entries), batch_size)]
    _fill(datasets[0], batches, compute, "encode texts")


def _fill(
    dataset: PairDataset,
    batches: list[list[tuple[str, Any]]],
    compute: Callable[[list[Any]], list[dict[str, torch.Tensor]]],
    name: str,
) -> None:
    """Adds what the store lacks of batches of (key, what it is computed from)."""
    assert dataset.precomputed is not None
    store, state = dataset.precomputed.store, PartialState()
    lacking = [batch for batch in batches if not all(key in store for key, _ in batch)]
    state.wait_for_everyone()  # all have looked before anyone writes
    share = lacking[state.process_index :: state.num_processes]
    for batch in tqdm(share, desc=name, disable=not state.is_main_process or not share, mininterval=5):
        for (key, _), tensors in zip(batch, compute([place for _, place in batch]), strict=True):
            store.add(key, tensors)
    store.write()
    state.wait_for_everyone()
    store.refresh()
