"""Which samples a step sees, and the random numbers of each: functions of the seed and the step number."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

BLOCK = 1000  # positions in which the shares of several data sets are kept exactly


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) from names and numbers, the same on every machine.

    torch's CPU generator uses the lower 32 bits alone, so neighbouring numbers have to be spread over them.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def sample_generator(seed: int, step: int, sample: int) -> torch.Generator:
    """CPU generator of one sample at one step: its noise, timestep and dropped conditions, on whichever process.

    Args:
        seed: of the run.
        step: counted from 0.
        sample: number in the data set. A sample that stands twice in a batch has the same draws twice.
    """
    return torch.Generator().manual_seed(seed_of("sample", seed, step, sample))


def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _apportion(weights: Sequence[float], places: int) -> list[int]:
    """Places for each weight by the method of the largest remainder."""
    exact = [places * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: places - sum(shares)]:
        shares[i] += 1
    return shares


def check_weights(weights: Sequence[float], count: int) -> None:
    """The rule for the weights of `count` data sets: none, or one positive number for each.

    Raises:
        ValueError: another number of them, or one that is not positive.
    """
    if weights and len(weights) != count:
        raise ValueError(f"`data_weights` must be one number for each `data` ({count}), got {len(weights)}.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"`data_weights` must be positive, got {list(weights)}; leave a data set out of `data`.")


class SampleOrder:
    """Which samples a step sees: a function of (seed, step number) alone, over one data set or several joined.

    Without weights or groups: one permutation of all samples for each epoch, cut into batches without gaps. With
    weights every data set has its own epochs, and in every block of 1000 positions the sets stand in the proportion of
    their weights (largest remainder), permuted. With groups (aspect buckets) every batch holds samples of one group:
    the last batch of a group is filled up from the group's first, and the batches of an epoch are permuted.

    Args:
        sizes: length of each data set; samples are numbered over all of them joined.
        weights: positive, one for each data set, or none. Without effect on a single data set.
        seed: of the run.
        groups: group of each sample, over all data sets joined; excludes weights.

    Raises:
        ValueError: an empty data set; weights of another number, not positive, or below a thousandth of their sum;
            weights and groups together; groups of another length.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] = (), seed: int = 0, groups: Sequence[int] | None = None
    ):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"each data set must hold at least one sample, got none: sizes {list(sizes)}.")
        check_weights(weights, len(sizes))
        if len(sizes) > 1 and weights and groups is not None:
            raise ValueError("`data_weights` must be left out where batches are grouped by aspect; drop one of them.")
        if groups is not None and len(groups) != sum(sizes):
            raise ValueError(f"`groups` must have one entry for each of the {sum(sizes)} samples, got {len(groups)}.")
        self.sizes, self.seed = list(sizes), seed
        self.weights = list(weights) if len(sizes) > 1 else []
        self.groups = None if groups is None else torch.as_tensor(groups)
        self._shares = _apportion(self.weights, BLOCK) if self.weights else []
        if self._shares and min(self._shares) < 1:
            raise ValueError(f"`data_weights` must each be at least 1/{BLOCK} of their sum, got {self.weights}.")
        self._starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self._memo: dict[Any, tuple[Any, Any]] = {}  # the last epoch, block or plan of each kind

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run must share with the one before, beside the seed."""
        groups = None if self.groups is None else len(self.groups.unique())
        return {"samples": self.sizes, "data_weights": self.weights, "groups": groups}

    def batch(self, step: int, batch_size: int) -> list[int]:
        """Sample numbers of one step.

        Args:
            step: counted from 0.
            batch_size: over all processes and micro-batches.
        """
        if self.groups is not None:
            count = sum(math.ceil(size / batch_size) for size in self.groups.unique(return_counts=True)[1].tolist())
            epoch, place = divmod(step, count)
            return self._remembered("plan", (epoch, batch_size), lambda: self._plan(epoch, batch_size))[place].tolist()
        positions = range(step * batch_size, (step + 1) * batch_size)
        if self._shares:
            return [self._weighted(position) for position in positions]
        total = sum(self.sizes)
        return [int(self._epoch(position // total)[position % total]) for position in positions]

    def _remembered(self, kind: Any, key: Any, compute: Callable[[], Any]) -> Any:
        if kind not in self._memo or self._memo[kind][0] != key:
            self._memo[kind] = (key, compute())
        return self._memo[kind][1]

    def _epoch(self, epoch: int) -> torch.Tensor:
        total = sum(self.sizes)
        return self._remembered("epoch", epoch, lambda: _permutation(total, seed_of("epoch", self.seed, epoch)))

    def _weighted(self, position: int) -> int:
        block, offset = divmod(position, BLOCK)
        part, before = self._remembered("block", block, lambda: self._block(block))[offset]
        epoch, place = divmod(block * self._shares[part] + before, self.sizes[part])
        seed = seed_of("data set", self.seed, part, epoch)
        order = self._remembered(part, epoch, lambda: _permutation(self.sizes[part], seed))
        return self._starts[part] + int(order[place])

    def _block(self, block: int) -> list[tuple[int, int]]:
        """For each position of a block: the data set, and how many of its samples stand before in the block."""
        parts = torch.arange(len(self._shares)).repeat_interleave(torch.tensor(self._shares))
        seen = [0] * len(self._shares)
        places = []
        for part in parts[_permutation(BLOCK, seed_of("block", self.seed, block))].tolist():
            places.append((part, seen[part]))
            seen[part] += 1
        return places

    def _plan(self, epoch: int, batch_size: int) -> torch.Tensor:
        """(batches, batch_size) sample numbers of an epoch, each row of one group."""
        assert self.groups is not None
        order = self._epoch(epoch)
        rows = []
        for group in self.groups.unique():
            members = order[self.groups[order] == group]
            wanted = math.ceil(len(members) / batch_size) * batch_size
            rows.append(members.repeat(math.ceil(wanted / len(members)))[:wanted].reshape(-1, batch_size))
        plan = torch.cat(rows)
        return plan[_permutation(len(plan), seed_of("plan", self.seed, epoch))]
