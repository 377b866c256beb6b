"""Mean and standard deviation of the pixels of a packed set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.images.decode import decode
from data.shards.index import SampleIndex
from data.shards.manifest import ImageStats

MAX_IMAGES = 10_000
_LEVELS = np.arange(256) / 255


def measure(
    folder: Path, shard_names: Sequence[str], index: SampleIndex, workers: int = 1
) -> ImageStats:
    """Measure up to 10,000 evenly spaced samples; the result does not depend on `workers`.

    The set is grey (1 channel) only if all measured images are. Samples that do not decode are left
    out. Raises DataError where none of the samples measured can be decoded.
    """
    count = min(len(index), MAX_IMAGES)
    ids = np.arange(count) * len(index) // count
    tasks = [(folder / shard_names[s], ids[index.shard[ids] == s]) for s in range(len(shard_names))]
    with ThreadPoolExecutor(workers) as pool:
        per_shard = pool.map(lambda task: _moments_of_shard(task[0], index, task[1]), tasks)
        moments = [m for shard in per_shard for m in shard]
    if not moments:
        raise DataError(
            f"none of {count} images read from {folder} can be decoded; "
            "are these image shards? check them with `scl doctor`"
        )
    channels = max(m.shape[1] for m in moments)
    mean, square = np.mean([np.broadcast_to(m, (2, channels)) for m in moments], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return ImageStats(
        channels=1 if channels == 1 else 3,
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
        measured_on=len(moments),
    )


def _moments_of_shard(path: Path, index: SampleIndex, ids: np.ndarray) -> list[np.ndarray]:
    moments = []
    with path.open("rb") as stream:
        for i in ids:
            content = os.pread(stream.fileno(), int(index.size[i]), int(index.offset[i]))
            # A corrupt image is the reader's business, counted there; here it only must not count.
            try:
                moments.append(_moments(content))
            except Exception:
                continue
    return moments


def _moments(content: bytes) -> np.ndarray:
    """Return [2, C]: the mean of the pixels and of their squares, scaled to [0, 1]."""
    counts = np.array(decode(content).histogram(), np.float64).reshape(-1, 256)
    counts /= counts[0].sum()
    return np.stack([counts @ _LEVELS, counts @ _LEVELS**2])
