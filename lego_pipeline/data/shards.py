"""Tensors on disk, found by content: what was computed once is never computed again.

A store is a folder of shards. `NAME.safetensors` holds tensors, `NAME.parquet` is its index: one row per entry with
the key, the names of its tensors, a checksum and whatever columns the writer adds. A shard is written under temporary
names, synced and renamed, the index last, so a reader sees only whole shards and a kill costs the unwritten shard
alone. Writers of several processes use different prefixes. Keys are digests of what an entry was computed from: the
pixels of a frame, the weights of a model, a text.

Used by `lego_pipeline.data.embedding_cache` and by training for latents and text encodings.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lego_pipeline.atomic import write_atomically
from lego_pipeline.images import to_rgb

SIZE = b"bytes of the tensors' file"  # in the metadata of an index


class ShardStore:
    """A folder of shards opened for reading and writing.

    Only keys and index columns are held in memory, tensors are read from memory-mapped files. Can be handed to worker
    processes, which open the files anew.

    Args:
        folder: made by the first `write` if absent.
        prefix: of the shards that this writer makes, e.g. the process index.
        shard_size: entries per shard.

    Raises:
        ValueError: a shard is cut off or unreadable; the message names its files.
    """

    def __init__(self, folder: str | os.PathLike, prefix: str = "0", shard_size: int = 512):
        self.folder, self.prefix, self.shard_size = Path(folder), prefix, shard_size
        self._indexes: dict[Path, pa.Table] = {}  # by the path of the tensors
        self._places: dict[str, tuple[Path, int]] = {}
        self._unwritten: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
        self._files: dict[Path, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __contains__(self, key: str) -> bool:
        return key in self._unwritten or key in self._places

    def __len__(self) -> int:
        return len(self._places.keys() | self._unwritten.keys())

    def __iter__(self) -> Iterator[str]:
        """The keys of all entries, of those that are not written yet last."""
        return iter([*self._places, *(key for key in self._unwritten if key not in self._places)])

    def refresh(self) -> None:
        """Takes up shards that other writers have finished since."""
        for index in sorted(self.folder.glob("*.parquet")):
            shard = index.with_suffix(".safetensors")
            if shard in self._indexes:
                continue
            try:
                table = pq.read_table(index)
            except (pa.ArrowInvalid, OSError) as error:
                raise _damaged(shard, str(error)) from error
            expected = int((table.schema.metadata or {}).get(SIZE, -1))
            found = shard.stat().st_size if shard.exists() else None
            if found != expected:
                is_cut = "is not there" if found is None else f"has {found} bytes instead of {expected}"
                raise _damaged(shard, f"{shard.name} {is_cut}")
            self._take_up(shard, table)

    def add(self, key: str, tensors: Mapping[str, torch.Tensor], **columns: Any) -> None:
        """Adds an entry, or does nothing if there is one under this key; full shards are written.

        Args:
            key: digest of what the tensors were computed from, see `content_key`.
            tensors: by name, any shapes and dtypes; they are copied.
            **columns: texts, numbers, truth values or None for the index.
        """
        if key in self:
            return
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._unwritten[key] = (copies, columns)
        if len(self._unwritten) >= self.shard_size:
            self.write()

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry by name, on the CPU; they share memory with the file, so copy before changing one.

        Raises:
            KeyError: there is no such entry.
            ValueError: the shard was cut off or changed since it was written.
        """
        if key in self._unwritten:
            return dict(self._unwritten[key][0])
        shard, row = self._place(key)
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(shard, framework="pt")
            names = self._indexes[shard]["tensors"][row].as_py()
            tensors = {name: self._files[shard].get_tensor(f"{key}.{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(shard, str(error)) from error
        if _checksum(tensors) != self._indexes[shard]["checksum"][row].as_py():
            raise _damaged(shard, "the checksum of an entry is wrong")
        return tensors

    def columns(self, key: str) -> dict[str, Any]:
        """The columns that an entry was added with; None for those that only others of its shard have.

        Raises:
            KeyError: there is no such entry.
        """
        if key in self._unwritten:
            return dict(self._unwritten[key][1])
        shard, row = self._place(key)
        table = self._indexes[shard]
        return {name: table[name][row].as_py() for name in table.column_names if name not in _OWN_COLUMNS}

    def write(self) -> None:
        """Writes a shard of the entries added since the last one.

        Raises:
            OSError: the disk is full, say; the entries are kept, so that writing may be tried again.
        """
        if not self._unwritten:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = list(self._unwritten)
        tensors = {f"{key}.{name}": t for key, (named, _) in self._unwritten.items() for name, t in named.items()}
        number = len(list(self.folder.glob(f"{self.prefix}-*.parquet")))
        # Named by content, so that two runs with one prefix, on train and on val say, never write each other's files.
        name = f"{self.prefix}-{number:06d}-{content_key(keys)[:8]}"
        shard = self.folder / f"{name}.safetensors"
        columns = {name: None for _, own in self._unwritten.values() for name in own}
        table = pa.table(
            {
                "key": keys,
                "tensors": [list(named) for named, _ in self._unwritten.values()],
                "checksum": [_checksum(named) for named, _ in self._unwritten.values()],
                **{name: [own.get(name) for _, own in self._unwritten.values()] for name in columns},
            }
        )
        try:
            write_atomically(shard, lambda path: save_file(tensors, path))
            table = table.replace_schema_metadata({SIZE: str(shard.stat().st_size)})
            write_atomically(shard.with_suffix(".parquet"), lambda path: pq.write_table(table, path))
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"the shard {shard} could not be written ({error}); free some space and run the same command again: "
                "what was written before is kept."
            ) from error
        self._take_up(shard, table)
        self._unwritten = {}

    def _take_up(self, shard: Path, table: pa.Table) -> None:
        self._indexes[shard] = table
        self._places.update((key, (shard, row)) for row, key in enumerate(table["key"].to_pylist()))

    def _place(self, key: str) -> tuple[Path, int]:
        if key not in self._places:
            raise KeyError(f"there is no entry {key} in {self.folder}.")
        return self._places[key]


_OWN_COLUMNS = ("key", "tensors", "checksum")


def _damaged(shard: Path, reason: str) -> ValueError:
    return ValueError(
        f"the shard {shard} must be as it was written, but is damaged ({reason}); delete it and its "
        f"{shard.with_suffix('.parquet').name}, and run what fills the folder again: only what it held is made anew."
    )


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of the tensors' bytes in the order of their names."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(_bytes(tensors[name]), checksum)
    return checksum


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# --- Keys ------------------------------------------------------------------------------------------------------------


def content_key(*facts: Any) -> str:
    """32 hex digits for facts that JSON can hold; the order of a dict's items doesn't matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def pixel_key(image: PIL.Image.Image) -> str:
    """Key of a frame: its size and its pixels as upright 8-bit RGB, whatever file they come from."""
    pixels = np.asarray(to_rgb(image))  # (H, W, 3)
    return hashlib.sha256(json.dumps(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]


def model_key(
    modules: torch.nn.Module | list[torch.nn.Module], *facts: Any, precision: torch.dtype = torch.float32
) -> str:
    """Key of a model: every weight of its modules, and further facts such as its config.

    Weights count by their values as float32, so a model loaded from a half-precision file has one key in half and in
    single precision. With `precision=torch.bfloat16` a model has one key in single precision and in bfloat16, whatever
    its file holds. Offloaded weights are read where they are.
    """
    modules = [modules] if isinstance(modules, torch.nn.Module) else modules
    states = [state_dict_of(module) for module in modules]
    weights = {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in sorted(state.items())}
    return weights_key(weights, *facts, precision=precision)


def weights_key(weights: Mapping[str, torch.Tensor], *facts: Any, precision: torch.dtype = torch.float32) -> str:
    """Key of named tensors in their order, by their values in a precision, and of further facts."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        digests = list(pool.map(partial(_weight_digest, precision=precision), weights.values()))
    names = [(name, list(tensor.shape)) for name, tensor in weights.items()]
    return content_key("model", names, digests, *facts)


def state_dict_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module, of one that accelerate has offloaded as well."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return get_state_dict_offloaded_model(module)
    return module.state_dict()


def _weight_digest(tensor: torch.Tensor, precision: torch.dtype) -> str:
    values = tensor.to(precision) if tensor.is_floating_point() else tensor
    return hashlib.sha256(_bytes(values)).hexdigest()
