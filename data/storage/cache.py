"""Shards fetched from elsewhere, kept on this machine and shared by all its processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from data.errors import DataError

_log = logging.getLogger("data")
_AGAIN_S = 0.1

Fill = Callable[[BinaryIO], object]


class Content(Protocol):
    """A shard, or a piece of one."""

    @property
    def sha256(self) -> str: ...

    @property
    def bytes(self) -> int: ...


class ShardCache:
    """A folder of shards, or pieces of them, named by their SHA-256, up to a number of bytes.

    Each has a lock file: shared while a process needs the shard, exclusive while one fetches
    or removes it. The kernel gives up the locks of a process that was killed. Needs `flock`: a
    local file system, not NFS.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {folder} cannot be made ({error.strerror}); name another folder"
            ) from error

    def path(self, shard: Content) -> Path:
        """Where the shard is once it has been fetched."""
        return self.folder / f"{shard.sha256}.tar"

    def clean(self) -> int:
        """Remove what killed fetches have left; return how many there were."""
        removed = 0
        for part in self.folder.glob("*.part"):
            with self._locked(part.stem, fcntl.LOCK_EX) as free:
                if free:
                    part.unlink(missing_ok=True)
                    removed += 1
        return removed

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until no other process is in a block of this name."""
        with self._locked(name, fcntl.LOCK_EX, wait=True):
            yield

    def bring(
        self,
        shard: Content,
        fill: Fill,
        urgent: Callable[[], bool] = lambda: True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Callable[[], None] | None:
        """Have a shard here and keep it; returns what lets go of it, None once `stopped`.

        `fill` writes and verifies it, unless it is here. Waits while another process is at it,
        and, unless it is `urgent`, while all room is taken by shards in use. Raises DataError
        where `fill` failed.
        """
        while not stopped():
            release = self._hold(shard)
            if release is not None:
                return release
            if not self._fetch(shard, fill, urgent):
                time.sleep(_AGAIN_S)
        return None

    def _hold(self, shard: Content) -> Callable[[], None] | None:
        lock = self._open_lock(shard.sha256)
        if _try_lock(lock, fcntl.LOCK_SH) and self._is_whole(shard):
            # Least recently used goes first; access times are often not kept.
            os.utime(self.path(shard))
            return functools.partial(os.close, lock)
        os.close(lock)
        return None

    def _fetch(self, shard: Content, fill: Fill, urgent: Callable[[], bool]) -> bool:
        """Whether the shard is here now; not, if another process is at it or there is no room."""
        with self._locked(shard.sha256, fcntl.LOCK_EX) as free:
            if not free:
                return False
            if self._is_whole(shard):
                return True
            part = self.folder / f"{shard.sha256}.part"
            if not part.exists() and not self._reserve(part, shard, urgent):
                return False
            try:
                # Unbuffered: a full disk is then met by the write, not by the close.
                with part.open("r+b", buffering=0) as stream:
                    fill(stream)
                    os.fsync(stream.fileno())
                part.replace(self.path(shard))
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return True

    def _reserve(self, part: Path, shard: Content, urgent: Callable[[], bool]) -> bool:
        """Make room for a shard, and a file of its size, so that others count it."""
        with self._locked("room", fcntl.LOCK_EX, wait=True):
            if not self._make_room(shard.bytes):
                if not urgent():
                    return False
                _log.warning(
                    "the shards in use do not fit in data.cache_gb (%.3g GB in %s); going over it",
                    self.limit / 1e9,
                    self.folder,
                )
            with part.open("wb") as stream:
                stream.truncate(shard.bytes)
        return True

    def _make_room(self, needed: int) -> bool:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        total = sum(status.st_size for _, status in files) + needed
        for path, status in files:
            if total <= self.limit:
                break
            if path.suffix == ".part":
                continue
            with self._locked(path.stem, fcntl.LOCK_EX) as unused:
                if unused:
                    path.unlink(missing_ok=True)
                    total -= status.st_size
        return total <= self.limit

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            if path.suffix in {".tar", ".part"}:
                # Others may rename or remove it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _is_whole(self, shard: Content) -> bool:
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def _open_lock(self, name: str) -> int:
        # Lock files stay for ever: removing one that another process has opened would let two
        # processes hold "the" lock.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return os.open(self.folder / f"{name}.lock", flags, 0o666)

    @contextlib.contextmanager
    def _locked(self, name: str, kind: int, wait: bool = False) -> Iterator[bool]:
        lock = self._open_lock(name)
        try:
            if wait:
                fcntl.flock(lock, kind)
            yield wait or _try_lock(lock, kind)
        finally:
            os.close(lock)


def _try_lock(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
