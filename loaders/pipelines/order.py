"""Which samples every step of every rank reads: pure functions of the seed, no I/O.

Random numbers are the raw 64-bit words of NumPy's Philox bit generator, a stream that NumPy keeps the same from
release to release (unlike the methods of `Generator`), so a run resumes with the next sample on any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from loaders.errors import UserError

DRAWS = 40
"""Uniform numbers per sample and step. `loaders.pipelines.transform` says what each column is for."""

LAST = ("wrap", "drop", "fill")
"""What may happen where an epoch ends within a batch, see `TrainPlan.last`."""

_WORDS = 4  # 64-bit words per Philox counter; DRAWS is a multiple, so a row starts on a counter
_ORDER, _DRAW = 0, 1  # keep the streams of epochs and of steps apart


def _philox(seed: int, stream: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence((seed, stream, number)))


@dataclass(frozen=True)
class Blocks:
    """A shuffle for storage that hates random reads: it takes runs of neighbours, a few at a time.

    The pool is cut into blocks of `size` neighbours that never span two shards; the cuts differ from epoch to epoch.
    The blocks come in random order, and the samples of `window` consecutive ones are shuffled together. So a rank's
    reads stay within window · size records for a while, and a batch mixes at most `window` places of the pack (two
    windows' where it spans them).
    """

    size: int = 256
    """Records per block."""
    window: int = 64
    """Blocks that are shuffled together."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.window < 1:
            raise UserError(f"blocks of {self.size} records, {self.window} at a time: both must be 1 or more")


def epoch_order(n: int, seed: int, epoch: int, blocks: Blocks | None = None, starts: Sequence[int] = ()) -> np.ndarray:
    """The order of an epoch: a (n,) int64 permutation of range(n), a function of the arguments alone.

    Uniform over all permutations, or with `blocks` over those that read in blocks. `starts`: where shards begin.
    """
    bits = _philox(seed, _ORDER, epoch)
    if blocks is None:
        return np.argsort(bits.random_raw(n), kind="stable")
    edges = np.unique(np.clip([0, *starts, n], 0, n))
    phases = bits.random_raw(len(edges) - 1) % np.uint64(blocks.size)  # length of a shard's first block
    cuts = [
        np.concatenate([[lo], np.arange(lo + int(phase) + 1, hi, blocks.size)])
        for lo, hi, phase in zip(edges[:-1].tolist(), edges[1:].tolist(), phases.tolist(), strict=True)
    ]
    first = np.concatenate(cuts)
    length = np.diff(first, append=n)
    chosen = np.argsort(bits.random_raw(len(first)), kind="stable")
    first, length = first[chosen], length[chosen]
    ends = np.cumsum(length)
    order = np.arange(n) + np.repeat(first - (ends - length), length)
    words = bits.random_raw(n)
    bounds = [0, *ends[blocks.window - 1 :: blocks.window].tolist(), n]
    for lo, hi in zip(bounds[:-1], bounds[1:], strict=True):
        order[lo:hi] = order[lo:hi][np.argsort(words[lo:hi], kind="stable")]
    return order


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
    [s * global_batch, (s + 1) * global_batch), in micro-batches that are equal contiguous slices of that; ranks take
    neighbouring ones, as many each, or, where `micro` says how large they are, one more or less. By default no sample
    is dropped, and a pool may be smaller than a batch.
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
    micro: int | None = None
    """Samples of a micro-batch, in the place of `accumulate`: any number of ranks shares them."""
    last: str = "wrap"
    """Where an epoch ends within a batch: `wrap`: the next epoch's samples follow; `drop`: the epoch ends before that
    batch, and other samples are left out in every epoch; `fill`: samples of the same epoch's start complete it."""
    blocks: Blocks | None = None
    """Shuffle in blocks; None: uniformly."""
    starts: tuple[int, ...] = ()
    """Record number at which each shard begins, for `blocks`."""
    _orders: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", np.ascontiguousarray(self.pool, dtype=np.int64))
        if self.blocks is not None:
            object.__setattr__(self, "pool", np.sort(self.pool))  # neighbours in the pool are neighbours on disk
        if self.pool.ndim != 1 or not len(self.pool):
            raise UserError("there are no samples to draw from: the selected part of the dataset is empty")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}; it must be 0 or more")
        if not 0 <= self.rank < self.world or self.accumulate < 1:
            raise UserError(
                f"rank {self.rank} of {self.world} ranks with {self.accumulate} micro-batches is not possible"
            )
        parts = self.world * self.accumulate
        if self.micro is not None:
            self._check_micro(self.micro)
        elif self.global_batch < 1 or self.global_batch % parts:
            below = self.global_batch // parts * parts
            nearest = " or ".join(str(b) for b in (below, below + parts) if b > 0)
            raise UserError(
                f"a global batch of {self.global_batch} does not divide over {self.world} ranks with"
                f" {self.accumulate} micro-batches each; take {nearest}"
            )

        if self.last not in LAST:
            raise UserError(f"unknown policy {self.last!r} for the last batch; there are {', '.join(LAST)}")
        if self.last == "drop" and len(self.pool) < self.global_batch:
            raise UserError(
                f"{len(self.pool):,} samples do not make one global batch of {self.global_batch}, and incomplete"
                " batches are to be dropped; take a smaller batch, or wrap"
            )

    def _check_micro(self, micro: int) -> None:
        if self.accumulate != 1:
            raise UserError(f"micro-batches of {micro} or {self.accumulate} of them a rank? Say one of both")
        count, rest = divmod(self.global_batch, micro)
        if rest or count < self.world:
            raise UserError(
                f"a global batch of {self.global_batch} is {self.global_batch / micro:g} micro-batches of {micro} for"
                f" {self.world} ranks; expected a whole number, and one for each rank at least"
            )

    @property
    def epoch_samples(self) -> int:
        """Samples per epoch, counting those that fill up the last batch and not those that are dropped."""
        n, batch = len(self.pool), self.global_batch
        return {"wrap": n, "drop": n // batch * batch, "fill": -(-n // batch) * batch}[self.last]

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch."""
        return self.micro or self.global_batch // (self.world * self.accumulate)

    @property
    def mine(self) -> range:
        """Which micro-batches of a step are this rank's."""
        each, more = divmod(self.global_batch // self.micro_batch, self.world)
        first = self.rank * each + min(self.rank, more)
        return range(first, first + each + (self.rank < more))

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # a batch spans two epochs at most, unless the pool is tiny
                self._orders.pop(next(iter(self._orders)))
            starts = np.searchsorted(self.pool, self.starts).tolist()
            self._orders[epoch] = epoch_order(len(self.pool), self.seed, epoch, self.blocks, starts)
        return self._orders[epoch]

    def _stream(self, start: int, stop: int) -> np.ndarray:
        n, length = len(self.pool), self.epoch_samples
        pieces = []
        for epoch in range(start // length, (stop - 1) // length + 1):
            lo, hi = max(start - epoch * length, 0), min(stop - epoch * length, length)
            pieces.append(self.pool[self._epoch(epoch)[np.arange(lo, hi) % n]])
        return np.concatenate(pieces)

    def step(self, step: int) -> list[StepSlice]:
        """The micro-batches of this rank in that step (0-based): slices of `micro_batch` samples."""
        b = self.micro_batch
        slices = []
        for number in self.mine:
            first = number * b
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

    def __post_init__(self) -> None:
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
