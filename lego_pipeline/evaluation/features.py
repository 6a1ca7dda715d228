"""What a network answered to a picture, kept on disk: a second evaluation asks it nothing.

An answer is found by what it was computed from, see `lego_pipeline.data.shards.content_key`: the metric and its mode,
the digest of the weights, and the digest of the picture (of the input frame too, where that is seen). Answers that are
computed are written at least every `WRITE_EVERY` seconds, so a kill costs no more than those.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lego_pipeline.data.shards import ShardStore

WRITE_EVERY = 30.0  # seconds
SHARD_SIZE = 4096  # answers


class FeatureCache:
    """Answers by key, in memory and in a folder.

    Args:
        folder: made when something is written; None keeps answers in memory only.
        batch_size: pictures that a network is given at a time.
        device: of the networks.

    Attributes:
        computed: answers that were computed and not found.

    Raises:
        ValueError: a damaged file in the folder; the message names it.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 16, device: str = "cpu"):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.batch_size, self.device, self.computed = batch_size, device, 0
        self._store = None if folder is None else ShardStore(folder, f"p{os.getpid()}", SHARD_SIZE)
        self._known: dict[str, np.ndarray] = {}

    def answers(
        self,
        keys: Sequence[str],
        compute: Callable[[Sequence[int]], Iterable[np.ndarray]],
        label: str,
        batch_size: int | None = None,
    ) -> list[np.ndarray]:
        """The answer of each key; what isn't there is computed in batches, with a progress bar.

        Args:
            keys: N; the same key is computed once.
            compute: gives the answers, arrays of any shape, of the keys at some positions.
            label: of the progress bar.
            batch_size: instead of the cache's own.
        """
        first: dict[str, int] = {}  # position of each key
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        missing = [i for key, i in first.items() if not self._has(key)]
        size, written = batch_size or self.batch_size, time.monotonic()
        try:
            for start in tqdm(range(0, len(missing), size), desc=label, disable=None, leave=False):
                indices = missing[start : start + size]
                for index, answer in zip(indices, compute(indices), strict=True):
                    self._keep(keys[index], np.asarray(answer))
                self.computed += len(indices)
                if time.monotonic() - written > WRITE_EVERY:
                    self._write()
                    written = time.monotonic()
        finally:  # also what was computed before a picture that can't be read
            self._write()
        return [self._get(key) for key in keys]

    def _has(self, key: str) -> bool:
        return key in self._known or (self._store is not None and key in self._store)

    def _get(self, key: str) -> np.ndarray:
        if key not in self._known:
            assert self._store is not None
            self._known[key] = self._store.get(key)["answer"].numpy().copy()
        return self._known[key]

    def _keep(self, key: str, answer: np.ndarray) -> None:
        self._known[key] = answer
        if self._store is not None:
            self._store.add(key, {"answer": torch.from_numpy(answer)})

    def _write(self) -> None:
        if self._store is not None:
            self._store.write()
