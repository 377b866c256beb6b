"""Who reads which sample when: pure functions of counts, seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.errors import DataError
from data.stream.deal import share, spread

# Sets up to this size are permuted uniformly, larger ones inside windows of this many samples of
# shuffled shards: 14 of ImageNet's 256 shards, 7 GB, are in flight. benchmarks/shuffle.py has the
# measurements behind the number.
WINDOW = 65_536

# Orders of sets larger than a window. The mixed one permutes a window uniformly and deals a batch
# as it comes, so that every rank reads every shard: runs that began with it end with it. The spread
# one has in each batch a fair share of each part of the window, dealt by place.
MIXED, SPREAD = 1, 2
ORDER = SPREAD


class EpochOrder:
    """The order of one epoch, a permutation of all sample ids: a function of (seed, epoch) alone.

    Sample ids count through the shards in order. A set larger than a window has its shards
    permuted, laid end to end and cut into windows, each permuted for itself: uniformly where
    `kind` is MIXED, evenly over the window's shards where it is SPREAD. Windows are computed when
    they are read, so that starting anywhere costs the same.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, epoch: int, kind: int = ORDER
    ) -> None:
        self._seed = [seed, epoch]
        sizes = np.asarray(shard_sizes, np.int64)
        self._total = int(sizes.sum())
        self._draws = len(sizes) if self._total > WINDOW else 0
        # What fits into a window is permuted uniformly, and read by all.
        self.is_spread = kind == SPREAD and self._draws > 0
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
        parts = self.parts(first, end)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def parts(self, first: int, end: int) -> list[np.ndarray]:
        """Return the samples at positions `first` to `end` by the window that they are from."""
        parts = []
        while first < end:
            number, inside = divmod(first, WINDOW)
            part = self._permuted(number)[inside : inside + end - first]
            parts.append(part)
            first += len(part)
        return parts

    def line(self, window: int) -> np.ndarray:
        """Return the samples of a window as they lie in its permuted shards, int64."""
        line = np.arange(*self.bounds(window))
        return line + self._shift[self._places(line)]

    def bounds(self, window: int) -> tuple[int, int]:
        """Return the first position of a window, and the one after its last."""
        return window * WINDOW, min((window + 1) * WINDOW, self._total)

    def _permuted(self, number: int) -> np.ndarray:
        if self._window[0] != number:
            line, first = self.line(number), number * WINDOW
            if self.is_spread:
                # By the shards' own numbers, not as they were permuted: a rank gets about the same
                # part of the set in every epoch, of which a cache may hold something.
                order = spread(_numbers(self._raw(self._draws + 2 * first), 2 * len(line)))
                line = np.sort(line)[order]
            else:
                line = line[_random_ranks(self._raw(self._draws + first), len(line))]
            self._window = number, line
        return self._window[1]

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
    return np.argsort(_numbers(raw, count), kind="stable")


def _numbers(raw: np.random.PCG64, count: int) -> np.ndarray:
    return np.asarray(raw.random_raw(count), np.uint64)


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, kind: int = ORDER) -> np.ndarray:
    """Return the whole permutation of an epoch at once, int64 [N]."""
    order = EpochOrder(shard_sizes, seed, epoch, kind)
    return order.ids(0, len(order))


@dataclass(frozen=True)
class BatchPlan:
    """The training batches of one rank.

    Global batch `b` of an epoch is a fixed stretch of its order, whatever the number of ranks and
    the accumulation. Of a set larger than a window it is sorted by where its samples lie, and rank
    after rank gets a contiguous part of it: each reads its own part of the window's shards, the
    same in all batches of the window. A rank reads in `accumulation` pieces; `order` is SPREAD, or
    MIXED for a run that began with it. Raises DataError where the numbers do not fit together (see
    `check_feasible`).
    """

    shard_sizes: Sequence[int]
    seed: int
    global_batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1
    order: int = ORDER

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
        order = self._epoch_order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            yield from np.split(self._own(order, step), self.accumulation)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the order that the global batches of an epoch are read from."""
        return -(-self.steps_per_epoch * self.global_batch_size // WINDOW)

    def windows(self, epoch: int, start_step: int = 0) -> Iterator[range]:
        """Yield the windows of each of `micro_batches`, counted through all epochs."""
        before = epoch * self.windows_per_epoch
        size = self.global_batch_size
        for step in range(start_step, self.steps_per_epoch):
            first, last = step * size // WINDOW, ((step + 1) * size - 1) // WINDOW
            yield from [range(before + first, before + last + 1)] * self.accumulation

    def window_ids(self, window: int) -> np.ndarray:
        """Return what this rank reads from a window, counted through all epochs; ascending ids.

        Where batches are dealt as they come, those of all ranks.
        """
        epoch, number = divmod(window, self.windows_per_epoch)
        order = self._epoch_order(epoch)
        if not order.is_spread:
            return np.sort(order.line(number))
        first, end = order.bounds(number)
        steps = range(
            first // self.global_batch_size,
            min(self.steps_per_epoch, -(-end // self.global_batch_size)),
        )
        read = np.concatenate([self._own(order, step) for step in steps])
        return np.intersect1d(read, order.line(number), assume_unique=True)

    def _epoch_order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.shard_sizes, self.seed, epoch, self.order)

    def _own(self, order: EpochOrder, step: int) -> np.ndarray:
        """This rank's part of a global batch."""
        first = step * self.global_batch_size
        if not order.is_spread:
            part = self.global_batch_size // self.world_size
            return order.ids(first + self.rank * part, first + (self.rank + 1) * part)
        parts = [np.sort(part) for part in order.parts(first, first + self.global_batch_size)]
        return np.concatenate(share(parts, self.rank, self.world_size))


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
