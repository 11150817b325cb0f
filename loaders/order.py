"""Which samples every step of every rank reads: pure functions of the seed, no I/O.

Random numbers are the raw 64-bit words of NumPy's Philox bit generator, a stream that NumPy keeps the same from
release to release (unlike the methods of `Generator`), so a run resumes with the next sample on any machine.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from loaders.errors import UserError

DRAWS = 40
"""Uniform numbers per sample and step. `loaders.transform` says what each column is for."""

_WORDS = 4  # 64-bit words per Philox counter; DRAWS is a multiple, so a row starts on a counter
_ORDER, _DRAW = 0, 1  # keep the streams of epochs and of steps apart


def _philox(seed: int, stream: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence((seed, stream, number)))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a (n,) int64 permutation of range(n), a function of (n, seed, epoch) alone."""
    return np.argsort(_philox(seed, _ORDER, epoch).random_raw(n), kind="stable")


def step_draws(seed: int, step: int, first: int, count: int) -> np.ndarray:
    """Rows [first, first + count) of the step's table of uniform numbers: (count, DRAWS) float64 in [0, 1)."""
    bits = _philox(seed, _DRAW, step)
    bits.advance(first * DRAWS // _WORDS)
    words = bits.random_raw(count * DRAWS)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(count, DRAWS)


class StepSlice(NamedTuple):
    """What one micro-batch of one rank reads."""

    ids: np.ndarray  # (b,) int64 record numbers in the pack
    draws: np.ndarray  # (b, DRAWS) float64 in [0, 1), the randomness of the augmentation


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """What each step reads: a function of (seed, step), whatever the number of ranks.

    The samples form one endless stream, the concatenation of the epochs' orders of the pool. Step s takes positions
    [s * global_batch, (s + 1) * global_batch); ranks take equal contiguous slices of that, micro-batches equal
    contiguous slices of those. No sample is dropped, and a pool may be smaller than a batch.
    """

    pool: np.ndarray
    """Record numbers that may be drawn: (n,) int64, all of a pack or a subset."""
    global_batch: int
    """Samples per step over all ranks and micro-batches."""
    seed: int
    """Non-negative; fixes the order and the augmentation."""
    rank: int = 0
    """This process, 0 ≤ rank < world."""
    world: int = 1
    """Number of processes."""
    accumulate: int = 1
    """Micro-batches per step and rank."""
    _orders: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "pool", np.ascontiguousarray(self.pool, dtype=np.int64))
        if self.pool.ndim != 1 or not len(self.pool):
            raise UserError("there are no samples to draw from: the selected part of the dataset is empty")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}; it must be 0 or more")
        if not 0 <= self.rank < self.world or self.accumulate < 1:
            raise UserError(
                f"rank {self.rank} of {self.world} ranks with {self.accumulate} micro-batches is not possible"
            )
        parts = self.world * self.accumulate
        if self.global_batch < 1 or self.global_batch % parts:
            below = self.global_batch // parts * parts
            nearest = " or ".join(str(b) for b in (below, below + parts) if b > 0)
            raise UserError(
                f"a global batch of {self.global_batch} does not divide over {self.world} ranks with"
                f" {self.accumulate} micro-batches each; take {nearest}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch of one rank."""
        return self.global_batch // (self.world * self.accumulate)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # a batch spans two epochs at most, unless the pool is tiny
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = epoch_order(len(self.pool), self.seed, epoch)
        return self._orders[epoch]

    def _stream(self, start: int, stop: int) -> np.ndarray:
        n = len(self.pool)
        pieces = []
        for epoch in range(start // n, (stop - 1) // n + 1):
            lo, hi = max(start - epoch * n, 0), min(stop - epoch * n, n)
            pieces.append(self.pool[self._epoch(epoch)[lo:hi]])
        return np.concatenate(pieces)

    def step(self, step: int) -> list[StepSlice]:
        """The micro-batches of this rank in that step (0-based): `accumulate` slices of `micro_batch` samples."""
        b = self.micro_batch
        slices = []
        for micro in range(self.accumulate):
            first = (self.rank * self.accumulate + micro) * b
            at = step * self.global_batch + first
            slices.append(StepSlice(self._stream(at, at + b), step_draws(self.seed, step, first, b)))
        return slices


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """Every sample of the pool exactly once over all ranks, in order, the same number of batches on every rank."""

    pool: np.ndarray
    """Record numbers to evaluate: (n,) int64."""
    batch: int
    """Samples per batch of one rank."""
    rank: int = 0
    """This process, 0 ≤ rank < world."""
    world: int = 1
    """Number of processes."""

    def __post_init__(self):
        object.__setattr__(self, "pool", np.ascontiguousarray(self.pool, dtype=np.int64))
        if self.pool.ndim != 1 or not len(self.pool):
            raise UserError("there are no samples to evaluate: the selected part of the dataset is empty")
        if self.batch < 1:
            raise UserError(f"the evaluation batch is {self.batch}; it must be 1 or more")
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank {self.rank} of {self.world} ranks is not possible")

    def __len__(self) -> int:
        """Batches per rank."""
        return -(-len(self.pool) // (self.batch * self.world))

    def batch_ids(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (batch,) int64 and valid (batch,) bool of one batch; the padding repeats the last sample."""
        at = (number * self.world + self.rank) * self.batch + np.arange(self.batch)
        return self.pool[np.minimum(at, len(self.pool) - 1)], at < len(self.pool)
