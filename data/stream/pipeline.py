"""Streams of batches for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from data.augmentation.transforms import modules_for
from data.config import DataConfig
from data.errors import DataError
from data.shards.manifest import ImageStats
from data.stream.batch_memory import Batch, BatchMemory
from data.stream.dataset import ShardDataset, TrainKey, open_split
from data.stream.loader import load
from data.stream.plan import BatchPlan, eval_batches

__all__ = [
    "Batch",
    "DataConfig",
    "ShardDataset",
    "eval_stream",
    "normalise",
    "open_split",
    "train_stream",
]


def train_stream(
    dataset: ShardDataset,
    plan: BatchPlan,
    config: DataConfig,
    *,
    start_epoch: int = 0,
    start_step: int = 0,
    epochs: int,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches from (start_epoch, start_step) to the end of the run.

    `epochs` is the length of the run: the last epoch is `epochs - 1`. Each step has
    `plan.accumulation` micro-batches; workers live as long as the stream.

    A batch holds image uint8 [B, C, H, W], and label, id and corrupt, int64 [B]. Raises DataError
    where the plan is for other shards, a shard cannot be read, or a worker dies.
    """
    if tuple(plan.shard_sizes) != dataset.shard_sizes:
        raise DataError(
            f"the plan is for {plan.samples} samples in {len(plan.shard_sizes)} shards, but "
            f"{dataset.store.name} has {len(dataset)} in {len(dataset.shard_sizes)}; "
            "build the plan from the data set's shard_sizes"
        )
    if plan.rank == 0:
        dataset.warn_if_sorted()
    view = dataset.with_seed(plan.seed, epochs)
    ahead = dataset.store.ahead(
        lambda window: dataset.stretches(plan.window_ids(window)),
        epochs * plan.windows_per_epoch,
    )
    keys = ahead.keys(
        _train_keys(plan, start_epoch, start_step, epochs),
        _train_windows(plan, start_epoch, start_step, epochs),
    )
    batches = _load(view, keys, config, config.workers, plan.micro_batch_size)
    return ahead.batches(_noting(dataset, batches))


def _load(
    dataset: ShardDataset,
    keys: Iterator[list[Any]],
    config: DataConfig,
    workers: int,
    batch_size: int,
) -> Iterator[Batch]:
    if not workers:
        return load(dataset, keys, workers=0, prefetch=config.prefetch)
    # What may be ahead, what the consumer holds, and what it asks for meanwhile.
    memory = BatchMemory(workers * config.prefetch + 2, batch_size * dataset.image_bytes)
    slotted, tasks = memory.dataset(dataset), memory.tasks(keys)
    loaded = load(
        slotted,
        tasks,
        workers=workers,
        prefetch=config.prefetch,
        modules=modules_for(config),
    )
    return memory.batches(loaded)


def _train_keys(
    plan: BatchPlan, start_epoch: int, start_step: int, epochs: int
) -> Iterator[list[TrainKey]]:
    for epoch in range(start_epoch, epochs):
        first = start_step if epoch == start_epoch else 0
        for ids in plan.micro_batches(epoch, first):
            yield [(epoch, sample) for sample in ids.tolist()]


def _train_windows(
    plan: BatchPlan, start_epoch: int, start_step: int, epochs: int
) -> Iterator[range]:
    for epoch in range(start_epoch, epochs):
        yield from plan.windows(epoch, start_step if epoch == start_epoch else 0)


def eval_stream(
    dataset: ShardDataset, config: DataConfig, world_size: int = 1, rank: int = 0
) -> Iterator[Batch]:
    """Yield this rank's evaluation batches, the same number and size on every rank.

    A batch holds what a training batch does, and valid, bool [B]: over all ranks each sample is
    valid exactly once. Raises DataError where there is no such rank, a shard cannot be read, or a
    worker dies.
    """
    planned = list(eval_batches(len(dataset), world_size, rank, config.eval_batch_size))
    workers = min(config.workers, len(planned))
    stages = [dataset.stages(ids) for ids, _ in planned]
    ahead = dataset.store.ahead(dataset.stage_stretches, stages[-1].stop)
    keys = ahead.keys((ids.tolist() for ids, _ in planned), stages)
    loaded = _load(dataset, keys, config, workers, len(planned[0][0]))
    batches = _noting(dataset, loaded)
    valid = [torch.from_numpy(valid) for _, valid in planned]
    return _with_valid(ahead.batches(batches), valid)


def _with_valid(batches: Iterator[Batch], valid: list[torch.Tensor]) -> Iterator[Batch]:
    for batch, mask in zip(batches, valid, strict=True):
        yield {**batch, "valid": mask}


def _noting(dataset: ShardDataset, batches: Iterator[Batch]) -> Iterator[Batch]:
    # Noted here, not in the workers: one log, with the run's handlers, and once per sample.
    for batch in batches:
        for sample in batch["id"][batch["corrupt"] != 0].tolist():
            dataset.note_corrupt(sample)
        yield batch


def normalise(
    images: torch.Tensor, stats: ImageStats, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Turn uint8 [B, C, H, W] into zero mean and unit variance, on the images' device.

    Raises DataError where the images have another number of channels than the statistics.
    """
    if images.shape[1] != stats.channels:
        raise DataError(
            f"images with {images.shape[1]} channels cannot be normalised by statistics for "
            f"{stats.channels}; use the statistics of the set the images come from"
        )
    scale, shift = _scale_shift(tuple(stats.mean), tuple(stats.std), images.device)
    return images.to(torch.float32).mul_(scale).add_(shift).to(dtype)


@lru_cache(maxsize=16)
def _scale_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # A channel that never varies has no scale; anything finite does.
    deviation = torch.tensor(std, dtype=torch.float64).clamp(min=1e-6)
    scale = 1 / (255 * deviation)
    shift = -torch.tensor(mean, dtype=torch.float64) / deviation
    shape = (1, -1, 1, 1)
    return (
        scale.reshape(shape).to(device, torch.float32),
        shift.reshape(shape).to(device, torch.float32),
    )
