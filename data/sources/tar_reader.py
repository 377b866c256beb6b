"""Samples that lie somewhere inside large files: read where they are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.sources.source import extension_of, hash_of_list

_MAX_OPEN = 128


class OpenFiles:
    """Files opened at first use, by each process for itself."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return the bytes there are of those asked for."""
        if path not in self._files:
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = path.open("rb")
        return os.pread(self._files[path].fileno(), size, offset)


@dataclass(frozen=True)
class TarReader:
    """Images inside one tar (or inside the tars in it), read without unpacking.

    `names` are those of the samples, `<class>/<file>`, as bytes [N], since a list of strings takes
    three times the memory in each process; `offset`, int64 [N], is the first byte of each in the
    file; `size` and `labels` are int64 [N].
    """

    path: Path
    names: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray
    _files: OpenFiles = field(default_factory=OpenFiles)

    def read(self, i: int) -> tuple[bytes, str, int]:
        size = int(self.size[i])
        content = self._files.read(self.path, int(self.offset[i]), size)
        if len(content) < size:
            raise DataError(f"{self.path} has become shorter since it was scanned; copy it again")
        return content, extension_of(content, self.where(i)), int(self.labels[i])

    @property
    def stamps(self) -> np.ndarray:
        """Size and time of change (ns) of the file, int64 [1, 2]."""
        status = self.path.stat()
        return np.array([[status.st_size, status.st_mtime_ns]], np.int64)

    def where(self, i: int) -> str:
        return f"{os.fsdecode(self.names[i])} in {self.path}"

    def content_hash(self) -> str:
        return hash_of_list([os.fsdecode(name) for name in self.names.tolist()], self.labels)
