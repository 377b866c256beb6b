"""Who reads which sample when: pure functions of counts, seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.errors import DataError

# Sets up to this size are permuted uniformly, larger ones inside windows of this many samples of
# shuffled shards: 14 of ImageNet's 256 shards, 7 GB, are in flight. benchmarks/shuffle.py has the
# measurements behind the number.
WINDOW = 65_536


class EpochOrder:
    """The order of one epoch, a permutation of all sample ids: a function of (seed, epoch) alone.

    Sample ids count through the shards in order. A set larger than a window has its shards
    permuted, laid end to end and cut into windows, each permuted uniformly. Windows are computed
    when they are read, so that starting anywhere costs the same.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, epoch: int) -> None:
        self._seed = [seed, epoch]
        sizes = np.asarray(shard_sizes, np.int64)
        self._total = int(sizes.sum())
        self._draws = len(sizes) if self._total > WINDOW else 0
        shards = np.arange(len(sizes))
        if self._draws:
            shards = _random_ranks(self._raw(0), self._draws)
        self._shards = shards
        self._ends = np.cumsum(sizes[shards])
        # From a place in the line of permuted shards to the sample's id.
        self._shift = (np.cumsum(sizes) - sizes)[shards] - (self._ends - sizes[shards])
        self._window = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._total

    @property
    def windows(self) -> int:
        return -(-self._total // WINDOW)

    def ids(self, first: int, end: int) -> np.ndarray:
        """Return the samples at positions `first` to `end` (exclusive), int64."""
        parts = []
        while first < end:
            number, inside = divmod(first, WINDOW)
            part = self._permuted(number)[inside : inside + end - first]
            parts.append(part)
            first += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def shards(self, window: int) -> list[int]:
        """Return the numbers of the shards that a window reads, in their permuted order."""
        first, end = self._bounds(window)
        return self._shards[self._places(first) : self._places(end - 1) + 1].tolist()

    def _permuted(self, number: int) -> np.ndarray:
        if self._window[0] != number:
            first, end = self._bounds(number)
            line = np.arange(first, end)
            line += self._shift[self._places(line)]
            raw = self._raw(self._draws + first)
            self._window = number, line[_random_ranks(raw, len(line))]
        return self._window[1]

    def _bounds(self, window: int) -> tuple[int, int]:
        return window * WINDOW, min((window + 1) * WINDOW, self._total)

    def _places(self, line: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._ends, line, side="right")

    def _raw(self, drawn: int) -> np.random.PCG64:
        """The generator as it is once `drawn` numbers have been taken from it."""
        raw = np.random.PCG64(np.random.SeedSequence(self._seed))
        raw.advance(drawn)
        return raw


def _random_ranks(raw: np.random.PCG64, count: int) -> np.ndarray:
    # Raw generator output and a stable sort are the same in every numpy; Generator.permutation
    # may change between versions, and with it the order in which a resumed run goes on.
    return np.argsort(np.asarray(raw.random_raw(count), np.uint64), kind="stable")


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return the whole permutation of an epoch at once, int64 [N]."""
    order = EpochOrder(shard_sizes, seed, epoch)
    return order.ids(0, len(order))


@dataclass(frozen=True)
class BatchPlan:
    """The training batches of one rank.

    Global batch `b` of an epoch is a fixed stretch of its order, whatever the number of ranks and
    the accumulation. A rank reads its contiguous part of it, in `accumulation` pieces. Raises
    DataError where the numbers do not fit together (see `check_feasible`).
    """

    shard_sizes: Sequence[int]
    seed: int
    global_batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        check_feasible(self.samples, self.global_batch_size, self.world_size, self.accumulation)
        if self.seed < 0:
            raise DataError(f"the seed is {self.seed}; it must be 0 or more")
        if not 0 <= self.rank < self.world_size:
            raise DataError(
                f"rank {self.rank} is not one of {self.world_size} ranks; "
                f"it must be 0 to {self.world_size - 1}"
            )

    @cached_property
    def samples(self) -> int:
        """Samples in the set."""
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch; the last incomplete one is dropped."""
        return self.samples // self.global_batch_size

    @property
    def dropped(self) -> int:
        """Samples left out of each epoch (different ones each time)."""
        return self.samples % self.global_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples this rank reads at a time."""
        return self.global_batch_size // (self.world_size * self.accumulation)

    def micro_batches(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Yield this rank's micro-batches, int64 [micro_batch_size], `accumulation` per step.

        Starting at `start_step` costs the same as starting at 0.
        """
        order = EpochOrder(self.shard_sizes, self.seed, epoch)
        for first, end in self._stretches(start_step):
            yield order.ids(first, end)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the order that the global batches of an epoch are read from."""
        return -(-self.steps_per_epoch * self.global_batch_size // WINDOW)

    def windows(self, epoch: int, start_step: int = 0) -> Iterator[range]:
        """Yield the windows of each of `micro_batches`, counted through all epochs."""
        before = epoch * self.windows_per_epoch
        for first, end in self._stretches(start_step):
            yield range(before + first // WINDOW, before + (end - 1) // WINDOW + 1)

    def window_shards(self, window: int) -> list[int]:
        """Return the shards of a window, counted through all epochs, in the order of reading."""
        epoch, number = divmod(window, self.windows_per_epoch)
        return EpochOrder(self.shard_sizes, self.seed, epoch).shards(number)

    def _stretches(self, start_step: int) -> Iterator[tuple[int, int]]:
        part = self.global_batch_size // self.world_size
        size = self.micro_batch_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.global_batch_size + self.rank * part
            for piece in range(self.accumulation):
                yield first + piece * size, first + (piece + 1) * size


def check_feasible(
    samples: int,
    global_batch_size: int,
    world_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
) -> None:
    """Refuse numbers that would leave a rank or a worker without work.

    Raises DataError, naming what would do, where the global batch cannot be divided, the set has
    not one global batch, or there are more workers per rank than it has micro-batches.
    """
    counts = {
        "global_batch_size": global_batch_size,
        "world_size": world_size,
        "accumulation": accumulation,
    }
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    unit = world_size * accumulation
    ways = f"{world_size} ranks × {accumulation} accumulation steps"
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise DataError(
            f"global_batch_size {global_batch_size} cannot be divided among {ways}; "
            f"the nearest possible: {nearest}"
        )
    if samples < global_batch_size:
        largest = samples // unit * unit
        fix = (
            f"use a global_batch_size of at most {largest}"
            if largest
            else f"use at most {samples} ranks × accumulation steps in all"
        )
        raise DataError(
            f"the set has {samples} samples, fewer than one global batch of {global_batch_size} "
            f"({ways}); {fix}"
        )
    _check_workers(samples // global_batch_size * accumulation, workers, ways)


def _check_workers(batches_per_rank: int, workers: int, ways: str) -> None:
    if workers > batches_per_rank:
        raise DataError(
            f"{workers} data workers per rank cannot all be fed: with {ways} a rank reads only "
            f"{batches_per_rank} micro-batches per epoch; use at most {batches_per_rank} workers"
        )


def eval_batches(
    samples: int, world_size: int, rank: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids int64 [B], valid bool [B]) so that each sample is valid exactly once over ranks.

    All ranks get the same number of batches of the same size B ≤ `batch_size`; what is left over
    repeats the last sample, with valid False. Raises DataError for a count below 1, and where there
    is no such rank.
    """
    if min(samples, world_size, batch_size) < 1 or not 0 <= rank < world_size:
        raise DataError(
            f"evaluation of {samples} samples by rank {rank} of {world_size} in batches of "
            f"{batch_size} is impossible; counts must be at least 1, the rank 0 to {world_size - 1}"
        )
    per_rank = -(-samples // world_size)
    batches = -(-per_rank // batch_size)
    # Equal batches instead of full ones and a rest: the least padding at one fixed size.
    size = -(-per_rank // batches)
    first, end = rank * per_rank, min((rank + 1) * per_rank, samples)
    for batch in range(batches):
        ids = first + batch * size + np.arange(size)
        yield np.minimum(ids, samples - 1), ids < end
