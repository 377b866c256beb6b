"""Where the files of one split are, and how its shards get ready to be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from data.shards.manifest import Manifest, load_manifest, verify_shards
from data.storage.ahead import Ahead, Stretch
from data.storage.reader import Places, WholeShards

_BLOCK = 8 << 20


class Store(Protocol):
    """The files of one split. Pickles: data workers get a copy.

    `name` is the split's place as it stands in messages; manifest and index are in `folder`;
    `places` says where the bytes of shards are once they are ready.
    """

    name: str
    folder: Path
    manifest: Manifest
    places: Places

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """What makes shards ready, stage by stage, for a stream that begins now."""
        ...


class LocalStore:
    """A split in a folder of this machine's file systems."""

    def __init__(self, folder: Path, window: int) -> None:
        self._window = window
        self.name = str(folder)
        self.folder = folder
        self.manifest = load_manifest(folder)
        verify_shards(folder, self.manifest)
        self._shards = [folder / shard.name for shard in self.manifest.shards]
        self.places: Places = WholeShards(self._shards)

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """Ask the kernel for long stretches, front to back, before workers pick from them."""
        # What does not fit into memory would be read twice; a small set is read in no time.
        in_flight = 2 * bytes_in_flight(self.manifest, self._window)
        big = self.manifest.samples > self._window
        useful = big and in_flight < psutil.virtual_memory().available
        return Ahead(
            stretches if useful else lambda _: [], end, self._read_ahead, threads=2, wait=False
        )

    def _read_ahead(
        self, stretch: Stretch, urgent: Callable[[], bool], stopped: Callable[[], bool]
    ) -> Callable[[], None]:
        read_ahead(self._shards[stretch.shard], stopped, stretch.first, stretch.end)
        return _nothing


def read_ahead(
    path: Path,
    stopped: Callable[[], bool] = lambda: False,
    first: int = 0,
    end: int | None = None,
) -> None:
    """Ask the kernel to read bytes `first` to `end` of a file into its cache, front to back."""
    # Only a hint: a shard that cannot be opened is reported by the worker that reads it.
    with contextlib.suppress(OSError), path.open("rb") as stream:
        end = os.fstat(stream.fileno()).st_size if end is None else end
        for start in range(first, end, _BLOCK):
            if stopped():
                return
            length = min(_BLOCK, end - start)
            os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _nothing() -> None:
    pass


def bytes_in_flight(manifest: Manifest, window: int) -> int:
    """Bytes of the shards that one window of the training order is read from, about."""
    sizes = [shard.bytes for shard in manifest.shards]
    share = min(1.0, window / max(1, manifest.samples))
    # A window begins and ends inside a shard.
    return min(sum(sizes), round(share * sum(sizes)) + 2 * max(sizes, default=0))
