"""Reading image bytes out of shards at the offsets of the index."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from data.errors import DataError

# Well below the usual limit of 1,024 open files.
MAX_OPEN = 128


class ShardReader:
    """Opens shards on demand and reads with `pread`; safe to pickle and to fork."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes (fewer at the end of the file) of shard number `shard`.

        Raises DataError where the shard cannot be opened or read.
        """
        try:
            return os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise DataError(
                f"{self.paths[shard]} cannot be read ({error.strerror or error}); "
                "check the file system, then `scl doctor`"
            ) from error

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._close_removed()
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def _close_removed(self) -> None:
        # What a cache has removed would take its room on the disk for as long as it is open.
        for shard, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._open.pop(shard))

    def close(self) -> None:
        """Close all files; the next read opens what it needs again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()
