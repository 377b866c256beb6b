"""The memory of batches, used again and again.

Fresh shared memory is zeroed and mapped page by page, which costs a worker a tenth of the time in
which it decodes the images. Here a rank and its workers share slots instead.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

Batch = dict[str, torch.Tensor]
Task = tuple[int | None, list[Any]]
Loaded = tuple[int | None, bool, Batch]


class BatchSource(Protocol):
    """A data set that puts batches together itself, in memory that it is given."""

    def load(self, keys: list[Any], room: torch.Tensor | None) -> tuple[Batch, bool]:
        """Return the batch, and whether its images are in `room`, uint8 [bytes]."""
        ...


class BatchMemory:
    """Slots of `slot_bytes`, each free again once nothing refers to the images in it.

    A consumer may keep as many batches as it likes: without a free slot, or where the images do
    not fit into one, a batch gets memory of its own.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        storage = torch.UntypedStorage._new_shared(slots * slot_bytes)
        self._slots = torch.tensor([], dtype=torch.uint8).set_(storage).view(slots, slot_bytes)
        self._array = self._slots.numpy()
        self._free = deque(range(slots))

    def dataset(self, source: BatchSource) -> SlottedDataset:
        """Return what workers load from, with these slots for its images."""
        return SlottedDataset(source, self._slots)

    def tasks(self, batches: Iterable[list[Any]]) -> Iterator[Task]:
        """Give each list of keys a slot, if one is free at the time."""
        for keys in batches:
            yield self._free.popleft() if self._free else None, keys

    def batches(self, loaded: Iterable[Loaded]) -> Iterator[Batch]:
        """Yield the batches; a slot is free when its images are not referred to any more."""
        for slot, is_used, batch in loaded:
            if slot is not None:
                if is_used and not batch["image"].is_pinned():
                    batch["image"] = self._lent(slot, batch["image"])
                else:
                    # Too small, or copied to pinned memory on the way.
                    self._free.append(slot)
            yield batch

    def _lent(self, slot: int, image: torch.Tensor) -> torch.Tensor:
        # A tensor made from an array keeps it alive as long as any view of the tensor lives: the
        # end of the array is the end of all use.
        view: np.ndarray = self._array[slot, : image.numel()]
        weakref.finalize(view, self._free.append, slot).atexit = False
        return torch.from_numpy(view).as_strided(image.shape, image.stride())


class SlottedDataset(Dataset[Any]):
    """The data set as workers see it: keys come with the number of a slot."""

    def __init__(self, source: BatchSource, slots: torch.Tensor) -> None:
        self._source = source
        self._slots = slots

    def __getitems__(self, task: Task) -> Loaded:
        """Load a batch into its slot, or elsewhere if it has none; says which."""
        slot, keys = task
        batch, is_used = self._source.load(keys, None if slot is None else self._slots[slot])
        return slot, is_used, batch
