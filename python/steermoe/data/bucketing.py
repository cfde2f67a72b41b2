"""Batches of clips of similar length: little padding, and yet every epoch in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

# Batches among which lengths are sorted: enough that neighbours are alike, few enough that an epoch stays shuffled.
POOLED_BATCHES = 50


class LengthBucketSampler(torch.utils.data.Sampler[int]):
    """Indices such that each ``batch_size`` consecutive ones have similar lengths.

    Each epoch shuffles all rows, sorts pools of ``batch_size * pooled_batches`` by length, longest first, cuts them into batches, and
    shuffles the batches. The batch with the longest clip comes first, so that what does not fit in memory fails at once; the short batch,
    if the rows do not divide, comes last, where a DataLoader's ``drop_last`` drops it (other rows each epoch).

    Give it to a DataLoader, or to Trainer as its train sampler: accelerate deals whole batches to the processes, so ``batch_size`` is the
    rows of one optimizer step, per-device batch x processes x accumulation, of which each device takes consecutive ones. The order
    depends on ``seed`` and the epoch alone, so every process has the same, and skipping the first batches resumes an epoch exactly.

    ``lengths`` (rows,), seconds or any other measure; NaN (unknown) counts as the median. ValueError for sizes below 1.
    """

    def __init__(
        self, lengths: Sequence[float] | np.ndarray, batch_size: int, *, seed: int = 0, pooled_batches: int = POOLED_BATCHES
    ) -> None:
        if batch_size < 1 or pooled_batches < 1:
            raise ValueError(f"batch_size and pooled_batches must be at least 1, got {batch_size} and {pooled_batches}")
        self.lengths = np.array(lengths, dtype=np.float64)
        if self.lengths.ndim != 1:
            raise ValueError(f"lengths must be (rows,), got shape {self.lengths.shape}")
        unknown = np.isnan(self.lengths)
        if unknown.any():
            self.lengths[unknown] = 0.0 if unknown.all() else np.median(self.lengths[~unknown])
        self.batch_size = batch_size
        self.pooled_batches = pooled_batches
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration has. Trainer and accelerate's loaders call it; a plain loop has to."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        # Taken off before sorting: which rows are left over must not depend on their length.
        order, rest = order[:whole], order[whole:]
        batches: list[np.ndarray] = []
        for pool in _slices(order, self.batch_size * self.pooled_batches):
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            batches += _slices(pool, self.batch_size)
        batches = [batches[index] for index in rng.permutation(len(batches))]
        if batches:
            longest = max(range(len(batches)), key=lambda index: self.lengths[batches[index]].max())
            batches.insert(0, batches.pop(longest))
        yield from (int(index) for batch in [*batches, rest] for index in batch)


def batches_by_length(lengths: Sequence[float] | np.ndarray, batch_size: int) -> list[list[int]]:
    """Every row once, longest first, in batches: for evaluation, where order does not matter and padding costs time."""
    known = np.nan_to_num(np.asarray(lengths, dtype=np.float64), nan=np.inf)
    return [batch.tolist() for batch in _slices(np.argsort(-known, kind="stable"), batch_size)]


def _slices(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
