"""Writing files so that a kill at any moment leaves either the old content or the new, whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError

_HOST = socket.gethostname().replace("-", "_")
# Tells this process from a dead one that had the same host name and pid (in containers, pid 1).
_TOKEN = secrets.token_hex(4)
_TEMPORARY = re.compile(r"^\.tmp-.+-(?P<host>[^-]*)-(?P<pid>\d+)-(?P<token>[0-9a-f]{8})$")
# What another host left cannot be asked whether it still lives; after a day nobody writes to it.
_ABANDONED_AFTER_S = 24 * 3600


# What to do where the file system refuses, by its reason.
_FIXES = {
    errno.ENOSPC: "make room on that disk, or choose another folder",
    errno.EDQUOT: "make room within your quota, or choose another folder",
    errno.EFBIG: "choose another file system, or raise the limit on the size of files",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "get the right to read and write there, or choose another folder",
    errno.EPERM: "get the right to read and write there, or choose another folder",
    errno.ENOTDIR: "a file is where a folder should be: move it, or choose another folder",
    errno.EEXIST: "a file is where a folder should be: move it, or choose another folder",
    errno.EISDIR: "a folder is where a file should be: move it, or choose another folder",
    errno.ENOENT: "it has been moved or removed meanwhile: start again",
}


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say in a sentence what a file system refuses in the block, which works in `folder`.

    Raises DataError instead of OSError, but for a reader of our output that has gone.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        fix = _FIXES.get(error.errno or 0, "check the file system")
        raise DataError(f"{error.filename or folder} cannot be used ({reason}); {fix}") from error


def temporary_beside(path: Path) -> Path:
    """The hidden name, in the same folder, under which this process prepares `path`."""
    return path.with_name(f".tmp-{path.name}-{_HOST}-{os.getpid()}-{_TOKEN}")


def fsync_dir(path: Path) -> None:
    """Make the names in folder `path` durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems have no such thing as syncing a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends it replaces `path`, durably.

    After an exception `path` is as it was, and nothing is left.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write that fails does not say to which file it was.
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_dir(path.parent)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8), durably and in one step.

    Raises OSError, in which case `path` is as it was.
    """
    with atomic_file(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to fill; when the block ends it gets that name, durably.

    After an exception, or a kill, there is no half of a folder. Raises OSError.
    """
    staging = temporary_beside(path)
    staging.mkdir()
    try:
        yield staging
        for file in staging.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        fsync_dir(staging)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    fsync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Delete folder `path`; killed half-way, it is gone under its own name all the same."""
    doomed = temporary_beside(path)
    path.rename(doomed)
    fsync_dir(path.parent)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what dead processes left half-written in `folder`; the names deleted.

    Temporary names of living processes stay, as do those of other hosts until they are a day old.
    """
    removed = []
    for entry in sorted(folder.glob(".tmp-*")):
        if not _is_abandoned(entry):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return removed


def _is_abandoned(entry: Path) -> bool:
    match = _TEMPORARY.match(entry.name)
    if match is None:
        return False
    if match["host"] == _HOST:
        if int(match["pid"]) == os.getpid():
            return match["token"] != _TOKEN
        # Here, so that files are written where there is no psutil, too.
        import psutil

        if not psutil.pid_exists(int(match["pid"])):
            return True
    return _newest_change(entry) < time.time() - _ABANDONED_AFTER_S


def _newest_change(entry: Path) -> float:
    """Seconds since the epoch; infinity if the entry is just now being renamed or deleted."""
    try:
        return max(path.stat().st_mtime for path in (entry, *entry.glob("*")))
    except FileNotFoundError:
        return float("inf")


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
