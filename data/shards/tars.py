"""The members of a tar, and of the tars inside a tar, found by reading headers alone."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from data.errors import DataError
from data.files import atomic_file

_BLOCK = 512


@dataclass(frozen=True)
class Members:
    """Where the files of a tar lie: `names` [N], first bytes int64 [N], lengths int64 [N].

    A file inside a class tar is called `<class tar without .tar>/<file>`.
    """

    names: list[str]
    offset: np.ndarray
    size: np.ndarray


def check_end(tar: tarfile.TarFile) -> None:
    """Read what follows the last member `tar` has found: the zeros that end every tar.

    tarfile takes a damaged header, or the end of the file at a member's edge, for the end. Raises
    tarfile.ReadError where it is something else.
    """
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("its end is missing")
    if block.count(0) < _BLOCK:
        raise tarfile.ReadError(f"there is no tar header at byte {tar.offset:,}")


def members_of(path: Path, kept: Path, *, nested: bool, progress: bool = True) -> Members:
    """List the files of `path`; of a `nested` one, those of the tars it holds.

    The list is kept in `kept` and taken from there while size and time of `path` are the same,
    since reading a million headers takes minutes. Raises DataError where there is no such file, it
    is not a whole tar, or one of tars holds something else.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; name the tar file to read") from error
    state = np.array([status.st_size, status.st_mtime_ns], np.int64)
    members = _kept_members(kept, state)
    if members is None:
        members = _scan(path, nested, progress)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as stream:
            names = np.array([os.fsencode(name) for name in members.names], "S")
            np.savez(stream, names=names, offset=members.offset, size=members.size, state=state)
    return members


def _kept_members(kept: Path, state: np.ndarray) -> Members | None:
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if not np.array_equal(stored["state"], state):
                return None
            names = [os.fsdecode(name) for name in stored["names"].tolist()]
            return Members(names, stored["offset"], stored["size"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _scan(path: Path, nested: bool, progress: bool) -> Members:
    rows: list[tuple[str, int, int]] = []
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=f"scanning {path.name}",
        disable=not progress,
    )
    with bar, path.open("rb") as stream:
        for name, offset, size in _files(stream, str(path)):
            if nested:
                rows += _inner_files(stream, path, name, offset, size)
            else:
                rows.append((name, offset, size))
            bar.update(offset + size - bar.n)
    if not rows:
        raise DataError(f"{path} holds no files; is it the right one?")
    names, offsets, sizes = zip(*rows, strict=True)
    return Members(list(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def _files(stream: IO[bytes], what: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and length of each file of an uncompressed tar."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            # Not `for member in tar`: that remembers them all.
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{what} is not a whole, uncompressed tar file ({error}); "
            "compare its size and checksum with the original's and copy it again"
        ) from error


def _inner_files(
    stream: IO[bytes], path: Path, name: str, offset: int, size: int
) -> list[tuple[str, int, int]]:
    folder, dot, extension = name.rpartition("/")[2].rpartition(".")
    if not dot or extension != "tar":
        raise DataError(
            f"{path} holds {name}, but only tars of one class each (n01440764.tar …) are expected; "
            "is it the tar of the training images?"
        )
    window: Any = _Window(stream, offset, size)
    return [
        (f"{folder}/{inner.removeprefix('./')}", offset + first, length)
        for inner, first, length in _files(window, f"{name} in {path}")
    ]


class _Window:
    """A part of an open file, as a file to read."""

    def __init__(self, stream: IO[bytes], first: int, size: int) -> None:
        self._descriptor = stream.fileno()
        self._first = first
        self._size = size
        self._position = 0

    def read(self, count: int) -> bytes:
        count = max(min(count, self._size - self._position), 0)
        content = os.pread(self._descriptor, count, self._first + self._position)
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position
