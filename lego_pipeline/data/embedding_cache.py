"""Descriptions and VLM embeddings on disk, found by content: what was computed once is never computed again.

Two kinds of entries:

- **frame**: `image_embeds` (N_i, D), found by the frame's pixels and the VLM; shared by all actions asked of a frame;
- **text**: a description and its `text_embeds` (T, D), found by the frame, the question, the VLM and how the
  description came about (seed and sampling settings, or the given text).

On disk a cache is a folder of shards: `N.safetensors` holds the tensors under their keys, `N.parquet` the index (key,
kind, description). A shard is written under temporary names, synced and renamed, its index last, so a reader sees
only whole shards and a kill costs the unwritten shard alone. Writers of several processes use different prefixes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lego_pipeline.vlm.base import Enhancement


def frame_key(image: PIL.Image.Image, vlm_key: str) -> str:
    """Key of a frame's image embeddings."""
    pixels = np.asarray(image.convert("RGB"))
    return _digest(["frame", vlm_key, list(pixels.shape)], pixels.tobytes())


def text_key(frame: str, question: str, **origin: Any) -> str:
    """Key of a description on a frame; `origin` says how it came about, e.g. seed=0, temperature=0.2, top_k=50."""
    return _digest(["text", frame, question, origin])


def vlm_key(vlm: torch.nn.Module) -> str:
    """Key of a VLM: its config and every weight."""
    return model_key(vlm, vlm.config.to_json_string())


def model_key(model: torch.nn.Module, config: str) -> str:
    """Key of a model: its config as text, and every weight."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class EmbeddingCache:
    """A cache folder opened for reading and writing.

    Args:
        folder: made if absent.
        prefix: of the shards that this writer makes, e.g. the process index.
        shard_size: entries per shard.
        dtype: in which tensors are stored.
    """

    def __init__(self, folder: Path, prefix: str = "0", shard_size: int = 512, dtype: torch.dtype = torch.float16):
        self.folder, self.prefix, self.shard_size, self.dtype = folder, prefix, shard_size, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, Path] = {}
        self._descriptions: dict[str, str] = {}
        self._unwritten: dict[str, torch.Tensor] = {}
        self._files: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes up shards that other writers have finished since."""
        for index in sorted(self.folder.glob("*.parquet")):
            table = pq.read_table(index)
            for key, description in zip(table["key"].to_pylist(), table["description"].to_pylist(), strict=True):
                self._places[key] = index.with_suffix(".safetensors")
                if description is not None:
                    self._descriptions[key] = description

    def __contains__(self, key: str) -> bool:
        return key in self._unwritten or key in self._places

    def __len__(self) -> int:
        return len(self._places.keys() | self._unwritten.keys())

    def tensor(self, key: str) -> torch.Tensor:
        """The embeddings under a key, in the stored dtype.

        Raises:
            KeyError: the cache has no such entry.
        """
        if key in self._unwritten:
            return self._unwritten[key]
        if key not in self._places:
            raise KeyError(f"no entry {key} in {self.folder}; fill the cache with `train/cache_embeddings.py`.")
        path = self._places[key]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path].get_tensor(key)

    def description(self, key: str) -> str:
        """The description of a text entry."""
        return self._descriptions[key]

    def enhancement(self, frame: str, text: str) -> Enhancement:
        """The enhancement made of a frame entry and a text entry."""
        return Enhancement(self.description(text), self.tensor(frame), self.tensor(text))

    def add(self, frame: str, text: str, enhancement: Enhancement) -> None:
        """Adds what is new of an enhancement; full shards are written."""
        if frame not in self:
            self._unwritten[frame] = self._stored(enhancement.image_embeds)
        if text not in self:
            self._descriptions[text] = enhancement.description
            self._unwritten[text] = self._stored(enhancement.text_embeds)
        if len(self._unwritten) >= self.shard_size:
            self.write()

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", self.dtype).clone()

    def write(self) -> None:
        """Writes a shard of the entries added since the last one."""
        if not self._unwritten:
            return
        number = len(list(self.folder.glob(f"{self.prefix}-*.parquet")))
        keys = list(self._unwritten)
        # Named by content, so that two runs with one prefix, on train and on val say, never write each other's files.
        shard = self.folder / f"{self.prefix}-{number:06d}-{_digest(keys)[:8]}"
        kinds = ["text" if key in self._descriptions else "frame" for key in keys]
        index = pa.table({"key": keys, "kind": kinds, "description": [self._descriptions.get(key) for key in keys]})
        write_atomically(shard.with_suffix(".safetensors"), lambda path: save_file(self._unwritten, path))
        write_atomically(shard.with_suffix(".parquet"), lambda path: pq.write_table(index, path))
        self._places.update(dict.fromkeys(keys, shard.with_suffix(".safetensors")))
        self._unwritten = {}


def _digest(facts: Iterable[Any], data: bytes = b"") -> str:
    return hashlib.sha256(json.dumps(list(facts), sort_keys=True).encode() + data).hexdigest()[:32]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path`, then syncs and renames it, so that `path` is whole or absent."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(unfinished)
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
