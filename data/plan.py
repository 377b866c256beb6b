"""Who reads which sample when: pure functions of counts, seed, epoch and position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError

# Runs of neighbours that stay close in time, so that a shard's pages are read while cached.
BLOCK = 64
# Sets up to this size are permuted uniformly. Larger ones are mixed block-wise over the whole
# set and uniformly inside windows of this many samples: about 7 GB of ImageNet in flight.
WINDOW = 65_536


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of all sample ids, int64 [N]: a function of (seed, epoch) alone.

    Sample ids count through the shards in order.
    """
    # Raw generator output and a stable sort are the same in every numpy; Generator.permutation
    # may change between versions, and with it the order in which a resumed run goes on.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    total = int(np.sum(shard_sizes))
    order = np.arange(total, dtype=np.int64)
    if total > WINDOW:
        order = _permute_blocks(shard_sizes, raw)
    whole = total // WINDOW * WINDOW
    windows = order[:whole].reshape(-1, WINDOW)
    windows[:] = np.take_along_axis(windows, _random_ranks(raw, windows.shape), axis=1)
    order[whole:] = order[whole:][_random_ranks(raw, (total - whole,))]
    return order


def _random_ranks(raw: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    keys = np.asarray(raw.random_raw(int(np.prod(shape))), np.uint64).reshape(shape)
    return np.argsort(keys, axis=-1, kind="stable")


def _permute_blocks(shard_sizes: Sequence[int], raw: np.random.PCG64) -> np.ndarray:
    sizes = np.asarray(shard_sizes, np.int64)
    blocks = -(-sizes // BLOCK)
    number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    start = np.repeat(np.cumsum(sizes) - sizes, blocks) + number * BLOCK
    length = np.minimum(BLOCK, np.repeat(sizes, blocks) - number * BLOCK)
    shuffled = _random_ranks(raw, start.shape)
    start, length = start[shuffled], length[shuffled]
    first = np.cumsum(length) - length
    return np.repeat(start - first, length) + np.arange(length.sum())


@dataclass(frozen=True)
class BatchPlan:
    """The training batches of one rank.

    Global batch ``b`` of an epoch is a fixed stretch of its order, whatever the number of ranks
    and the accumulation. A rank reads its contiguous part of it, in ``accumulation`` pieces.

    Raises:
        DataError: the numbers do not fit together (see ``check_feasible``).
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

    @property
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
        """Yield this rank's micro-batches, int64 [micro_batch_size], ``accumulation`` per step.

        Starting at ``start_step`` costs the same as starting at 0.
        """
        order = epoch_order(self.shard_sizes, self.seed, epoch)
        part = self.global_batch_size // self.world_size
        size = self.micro_batch_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.global_batch_size + self.rank * part
            for piece in range(self.accumulation):
                yield order[first + piece * size : first + (piece + 1) * size]


def check_feasible(
    samples: int,
    global_batch_size: int,
    world_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
) -> None:
    """Refuse numbers that would leave a rank or a worker without work.

    Raises:
        DataError: the global batch cannot be divided, the set has not one global batch, or
            there are more workers per rank than it has micro-batches; names what would do.
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

    All ranks get the same number of batches of the same size B ≤ ``batch_size``; what is left
    over repeats the last sample, with valid False.

    Raises:
        DataError: a count below 1, or no such rank.
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
