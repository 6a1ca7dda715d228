"""Pairs of frames as training reads them: latents, text encodings, VLM embeddings and random numbers of one sample.

What grows with the data and is held in memory are the facts of `lego_pipeline.data.facts` (sizes and three keys of a
pair, about 130 bytes) and the keys of the stores' entries. Frames come from the manifest, latents and text encodings
from a `ShardStore` that is filled once (`lego_pipeline.data.precomputed`), VLM embeddings from an `EmbeddingCache`,
all memory-mapped. A sample is asked for by (step, number), and all its random numbers come from these two and the
seed, so it makes no difference which process or loader worker makes it.

Letters: H, W frame size in pixels as the model sees it, h, w latent size, c latent channels, C width of the text
encoder's states, N_i VLM image tokens, K width of a frame's states, N_t text states, D VLM width.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lego_pipeline import images
from lego_pipeline.data.boxes import box_mask
from lego_pipeline.data.embedding_cache import FILL, EmbeddingCache, Recipe
from lego_pipeline.data.facts import FRAMES, centre_crop, read_frame
from lego_pipeline.data.mirror import mirror_boxes, mirror_image, mirror_text
from lego_pipeline.data.shards import ShardStore, content_key
from lego_pipeline.training import sample_generator

VALIDATION_STEP = -1  # the step of draws that are the same whenever a model is validated
CHUNK = 1000  # rows that are read at once for a digest


# --- Random numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of a sample at a step.

    Attributes:
        seed: of the run.
        alphas_cumprod: (T,) abar of the scheduler's timesteps; sigma = sqrt((1 - abar) / abar).
        timestep_sampling: "uniform", or "log_normal": log sigma ~ N(log_sigma_mean, 1), nearest timestep.
        log_sigma_mean: of the latter.
        vlm_dropout: share of samples without the VLM's parts, half of these with the bare label.
        has_dropout: False for validation: no condition is dropped.
    """

    seed: int
    alphas_cumprod: torch.Tensor
    timestep_sampling: str = "uniform"
    log_sigma_mean: float = 0.0
    vlm_dropout: float = 0.0
    has_dropout: bool = True

    def __call__(self, step: int, sample: int, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        """Draws for latents of `shape` (c, h, w).

        Returns:
            `timestep` () long; `noise`, `posterior_noise` (c, h, w) and `offset` (c, 1, 1), standard normal;
            `drop` () uniform in [0, 1) for `drop_conditions` (1 without dropout); `no_vlm`, `use_label` () bool.
        """
        generator = sample_generator(self.seed, step, sample)
        uniform, normal = torch.rand(4, generator=generator), torch.randn((), generator=generator)
        noise, posterior_noise = torch.randn(2, *shape, generator=generator)
        if self.timestep_sampling == "uniform":
            timestep = (uniform[0] * len(self.alphas_cumprod)).long()
        else:
            log_sigmas = 0.5 * torch.log((1 - self.alphas_cumprod) / self.alphas_cumprod)
            timestep = (normal + self.log_sigma_mean - log_sigmas).abs().argmin()
        no_vlm = (uniform[2] < self.vlm_dropout) & self.has_dropout
        return {
            "timestep": timestep,
            "noise": noise,
            "posterior_noise": posterior_noise,
            "offset": torch.randn(shape[0], 1, 1, generator=generator),
            "drop": uniform[1] if self.has_dropout else torch.ones(()),
            "no_vlm": no_vlm,
            "use_label": no_vlm & (uniform[3] < 0.5),
        }


# --- The data set ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Latents and text encodings on disk, found by content.

    Attributes:
        store: one for both; its prefix is the process index.
        vae_key, text_key: of the models that compute them.
    """

    store: ShardStore
    vae_key: str
    text_key: str

    def latents_key(self, pixels: str, size: tuple[int, int], window: Sequence[float] | None, mirrored: bool) -> str:
        """Key of a frame's `mean` and `std` (c, h, w); `pixels` is the key of the frame as it is in the file."""
        return content_key("latents", self.vae_key, pixels, size, window, mirrored)

    def prompt_key(self, text: str) -> str:
        """Key of a text's `states` (77, C)."""
        return content_key("prompt", self.text_key, text)


class PairDataset(TorchDataset):
    """All samples of some data sets; each is asked for by (step, number).

    Numbers run over the data sets joined. With flips every data set is twice as long, the mirrored pairs behind.

    Args:
        rows: of the manifests.
        facts: of the same, from `lego_pipeline.data.facts.read_facts`.
        draws: of random numbers.
        resolution: side in pixels of the square whose area is trained at.
        factor: pixels per latent cell.
        latent_channels: c.
        size: (height, width) of all samples, others centre-cropped; None leaves every pair the size of its aspect.
        flips: add the mirrored pairs: frames, boxes, and left and right in the words.
        box_weight: of the loss where a box of hand or object touches a cell, against 1 elsewhere.
        precomputed: None to give pixels and texts instead.
        cache, recipe: of the VLM's embeddings; None for none.
        num_text_tokens: N_t, to which text states are cut or padded with zeros.
        gives_frames: give the frame, the label and the manifest's description, for a VLM that runs in the step.
    """

    def __init__(
        self,
        rows: Sequence[Dataset],
        facts: Sequence[pa.Table],
        draws: Draws,
        *,
        resolution: int,
        factor: int,
        latent_channels: int,
        size: tuple[int, int] | None = None,
        flips: bool = False,
        box_weight: float = 1.0,
        precomputed: Precomputed | None = None,
        cache: EmbeddingCache | None = None,
        recipe: Recipe | None = None,
        num_text_tokens: int = 77,
        gives_frames: bool = False,
    ):
        self.words = [part.select_columns(["id", "action", "description", "boxes_0", "boxes_1"]) for part in rows]
        self.frames = [[part.select_columns([name]) for name in FRAMES] for part in rows]
        self.facts, self.draws = list(facts), draws
        self.resolution, self.factor, self.latent_channels = resolution, factor, latent_channels
        self.size, self.flips, self.box_weight = size, flips, box_weight
        self.precomputed, self.cache, self.recipe = precomputed, cache, recipe
        self.num_text_tokens, self.gives_frames = num_text_tokens, gives_frames
        self.sizes = [len(part) * (2 if flips else 1) for part in rows]
        self._starts = [0, *accumulate(self.sizes)]
        if cache is not None:
            self._check_cache(cache)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """One sample.

        Args:
            index: (step, number).

        Returns:
            What `Draws` gives; `sample` () long, its number; `weights` (h, w), of the loss; and
            - precomputed: `image_latents`, `target`, `target_std` (c, h, w), unscaled posterior means of both frames
              and the target's deviation, `prompt_embeds` (77, C); otherwise `pixels` (2, 3, H, W) and `prompt`;
            - with a cache: `image_states` (N_i, K), before the VLM's projector, and `text_embeds` (N_t, D);
            - with `gives_frames`: `frame`, `action` and `description` (may be None) instead of the prompt.
        """
        step, sample = index
        height, width = self.size_of(sample)
        item = self.draws(step, sample, (self.latent_channels, height // self.factor, width // self.factor))
        result: dict[str, Any] = {**item, "sample": torch.tensor(sample), "weights": self._weights(sample)}
        if self.precomputed is None:
            result["pixels"] = torch.stack([self.pixels(sample, k) for k in (0, 1)])
        else:
            before, after = (self.precomputed.store.get(self.latents_key(sample, k)) for k in (0, 1))
            result |= {"image_latents": before["mean"], "target": after["mean"], "target_std": after["std"]}
        description, label = self.texts(sample)
        if self.gives_frames:
            result |= {"frame": self.frame(sample, 0), "action": label, "description": description}
        else:
            prompt = label if item["use_label"] or description is None else description
            if self.precomputed is None:
                result["prompt"] = prompt
            else:
                result["prompt_embeds"] = self.precomputed.store.get(self.precomputed.prompt_key(prompt))["states"]
        if self.cache is not None:
            frame, text = self.embedding_keys(sample)
            states = self.cache.text_embeds(text)[: self.num_text_tokens]  # (T, D)
            result["text_embeds"] = functional.pad(states, (0, 0, 0, self.num_text_tokens - len(states)))
            result["image_states"] = self.cache.frame_states(frame)
        return result

    def digest(self) -> str:
        """Of the frames, words and boxes of all rows, in order: with another one a run is another."""
        digest = hashlib.sha256()
        for words, facts in zip(self.words, self.facts, strict=True):
            table = words.remove_columns("id").with_format("arrow")
            for start in range(0, len(words), CHUNK):
                for part in (table[start : start + CHUNK], facts.slice(start, CHUNK)):
                    digest.update(json.dumps(part.to_pylist(), sort_keys=True).encode())
        return digest.hexdigest()[:32]

    def place_of(self, sample: int) -> tuple[int, int, bool]:
        """(data set, row, whether mirrored) of a sample."""
        part = bisect_right(self._starts, sample) - 1
        number, length = sample - self._starts[part], len(self.words[part])
        return part, number % length, number >= length

    def size_of(self, sample: int) -> tuple[int, int]:
        """(height, width) in pixels at which the model sees a sample."""
        if self.size is not None:
            return self.size
        part, row, _ = self.place_of(sample)
        own = (self._fact(part, row, f"{side}_0") for side in ("height", "width"))
        return images.model_size(*own, self.resolution, self.factor)

    def groups(self) -> list[int]:
        """For each sample the number of its size, for batches of one size."""
        numbers: dict[tuple[int, int], int] = {}
        return [numbers.setdefault(self.size_of(sample), len(numbers)) for sample in range(len(self))]

    def texts(self, sample: int) -> tuple[str | None, str]:
        """Description and label of a sample.

        The description is the cache's, the manifest's where a VLM runs in the step (None if it has none), and
        otherwise the label itself.
        """
        part, row, mirrored = self.place_of(sample)
        words = self.words[part][row]
        label = mirror_text(words["action"]) if mirrored else words["action"]
        if self.cache is not None:
            return self.cache.description(self.embedding_keys(sample)[1]), label
        if not self.gives_frames:
            return label, label
        description = words["description"] or None
        return mirror_text(description) if mirrored and description else description, label

    def embedding_keys(self, sample: int) -> tuple[str, str]:
        """Keys of the frame entry and the text entry in the cache."""
        assert self.cache is not None and self.recipe is not None
        part, row, mirrored = self.place_of(sample)
        words = self.words[part][row]
        texts = [words["action"]]
        if self.recipe.descriptions == "manifest":
            texts.append(words["description"] or "")
        pixels = self._fact(part, row, "mirrored_0" if mirrored else "pixels_0")
        action, *description = [mirror_text(text) if mirrored else text for text in texts]
        return self.cache.keys(pixels, action, self.recipe, *description)

    def latents_key(self, sample: int, k: int) -> str:
        """Key of the latents of a sample's frame k."""
        assert self.precomputed is not None
        part, row, mirrored = self.place_of(sample)
        pixels = self._fact(part, row, f"pixels_{k}")
        return self.precomputed.latents_key(pixels, self.size_of(sample), self._window(sample, k), mirrored)

    def pixels(self, sample: int, k: int) -> torch.Tensor:
        """Frame k of a sample as the VAE takes it, (3, H, W) in [-1, 1]."""
        frame, window = self.frame(sample, k), self._window(sample, k)
        if window is not None:
            x0, y0, x1, y1 = window
            width, height = frame.size
            frame = frame.crop((round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)))
        return images.to_model_input(frame, *self.size_of(sample))

    def _check_cache(self, cache: EmbeddingCache) -> None:
        missing = [i for i in range(len(self)) if not all(key in cache for key in self.embedding_keys(i))]
        if missing:
            part, row, mirrored = self.place_of(missing[0])
            name = f"{self.words[part][row]['id']!r}{' mirrored' if mirrored else ''}"
            flips = " with `--flips`" if self.flips else ""
            raise ValueError(
                f"`cache` must hold every pair, but {cache.folder} lacks {len(missing)} of {len(self)}, the first is "
                f"{name}; {FILL}{flips}, for this data and this VLM."
            )

    def _fact(self, part: int, row: int, name: str) -> Any:
        return self.facts[part][name][row].as_py()

    def frame(self, sample: int, k: int) -> PIL.Image.Image:
        """Frame k of a sample as the manifest has it, or mirrored."""
        part, row, mirrored = self.place_of(sample)
        frame = read_frame(self.frames[part][k][row][FRAMES[k]])
        return mirror_image(frame) if mirrored else frame

    def _window(self, sample: int, k: int) -> tuple[float, float, float, float] | None:
        """Part of frame k that is kept, None for the whole: frames of another aspect are cropped."""
        part, row, _ = self.place_of(sample)
        height, width = (self._fact(part, row, f"{side}_{k}") for side in ("height", "width"))
        size = self.size_of(sample)
        if images.model_size(height, width, self.resolution, self.factor) == size:
            return None
        return centre_crop(width, height, size)

    def _weights(self, sample: int) -> torch.Tensor:
        """(h, w) loss weights of latent cells."""
        height, width = (side // self.factor for side in self.size_of(sample))
        if self.box_weight == 1:
            return torch.ones(height, width)
        part, row, mirrored = self.place_of(sample)
        words, mask = self.words[part][row], torch.zeros(height, width, dtype=torch.bool)
        for k in (0, 1):
            boxes = words[f"boxes_{k}"] or []
            boxes = mirror_boxes(boxes) if mirrored else boxes
            mask |= box_mask(_boxes_within(boxes, self._window(sample, k)), height, width)
        return torch.where(mask, self.box_weight, 1.0)


def _boxes_within(
    boxes: Iterable[Mapping[str, Any]], window: tuple[float, float, float, float] | None
) -> list[Mapping[str, Any]]:
    """Boxes in fractions of a window of the frame; those outside it are dropped."""
    if window is None:
        return list(boxes)
    x0, y0, x1, y1 = window
    moved = [
        {
            "x0": _clip((box["x0"] - x0) / (x1 - x0)),
            "y0": _clip((box["y0"] - y0) / (y1 - y0)),
            "x1": _clip((box["x1"] - x0) / (x1 - x0)),
            "y1": _clip((box["y1"] - y0) / (y1 - y0)),
        }
        for box in boxes
    ]
    return [box for box in moved if box["x0"] < box["x1"] and box["y0"] < box["y1"]]


def _clip(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))


# --- Loading --------------------------------------------------------------------------------------------


def load_batches(
    dataset: PairDataset, plan: Iterable[list[tuple[int, int]]], *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Batches of samples, loaded ahead by worker processes; torch's global generator is left as it is.

    Args:
        dataset: of the samples.
        plan: the batches' (step, number) pairs, in order; read ahead of the batches.
        num_workers: processes that load; 0 loads in this one.
        pin_memory: for copies to a GPU.

    Returns:
        As `PairDataset` gives them: tensors stacked, the rest in lists.
    """
    return iter(
        DataLoader(
            dataset,
            batch_sampler=plan,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # a new iterator would draw a seed from the global one
        )
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples: tensors stacked, the rest in lists."""
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: torch.stack(c) if isinstance(c[0], torch.Tensor) else c for name, c in columns.items()}
