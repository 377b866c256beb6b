"""What lies in a packed split, counted from its own files: compared with the source, shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, Manifest


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split; `smallest` and `largest` are a class name and its samples."""

    split: str
    samples: int
    classes: int
    shards: int
    bytes: int
    smallest: tuple[str, int]
    largest: tuple[str, int]


def summarise(folder: Path, manifest: Manifest) -> SplitSummary:
    """Count the samples of each class in the index of `folder`.

    Raises DataError where the index cannot be read.
    """
    counts = class_counts(SampleIndex.load(folder / INDEX_NAME).label, len(manifest.classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    return SplitSummary(
        split=manifest.split,
        samples=manifest.samples,
        classes=len(manifest.classes),
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        smallest=(manifest.names[small], int(counts[small])),
        largest=(manifest.names[large], int(counts[large])),
    )


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the samples of each class, int64 [classes]."""
    return np.bincount(labels, minlength=classes)


def check_against_source(folder: Path, index: SampleIndex, labels: np.ndarray) -> None:
    """Compare what was found in the shards on disk with the source's labels.

    Raises DataError, naming the first class that has another number of samples than in the source.
    """
    classes = int(max(labels.max(), index.label.max())) + 1
    packed, wanted = class_counts(index.label, classes), class_counts(labels, classes)
    wrong = np.flatnonzero(packed != wanted)
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"the shards in {folder} hold {packed[first]} samples of class {first}, but the source "
            f"has {wanted[first]} ({len(wrong)} classes differ); remove the folder and pack again"
        )
