"""Reading image bytes out of shards at the offsets of the index."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError

# Well below the usual limit of 1,024 open files.
MAX_OPEN = 128


class Places(Protocol):
    """In which files the bytes of shards lie. Pickles."""

    def find(self, shard: int, offset: int) -> tuple[Path, int]:
        """Return the file that holds a byte of a shard, and which of the shard's is its first."""
        ...

    def bring(self, shard: int, offset: int) -> Callable[[], None] | None:
        """Have that file here; returns what lets go of it, None where it can only be found."""
        ...


class WholeShards:
    """Each shard in a file of its own, which is here or not."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def find(self, shard: int, offset: int) -> tuple[Path, int]:
        return self._paths[shard], 0

    def bring(self, shard: int, offset: int) -> Callable[[], None] | None:
        return None


class ShardReader:
    """Opens shards on demand and reads with `pread`; safe to pickle and to fork."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes (fewer at the end of the file) of shard number `shard`.

        What lies in one piece of it, if it is in pieces. Raises DataError where the shard cannot be
        opened or read.
        """
        path, first = self.places.find(shard, offset)
        try:
            return os.pread(self._descriptor(path, shard, offset), size, offset - first)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error}); "
                "check the file system, then `scl doctor`"
            ) from error

    def _descriptor(self, path: Path, shard: int, offset: int) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        self._close_removed()
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[path] = _opened(path)
        except FileNotFoundError:
            # The neighbour of a corrupt sample may lie in a piece that this machine does not read.
            release = self.places.bring(shard, offset)
            if release is None:
                raise
            self._open[path] = _opened(path)
            release()
        return self._open[path]

    def _close_removed(self) -> None:
        # What a cache has removed would take its room on the disk for as long as it is open.
        for path, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._open.pop(path))

    def close(self) -> None:
        """Close all files; the next read opens what it needs again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
