"""Writing one shard: the unit of parallel packing and of resuming."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.errors import DataError
from data.files import atomic_file
from data.images.decode import said_by_pillow
from data.packing.encoding import Encoding
from data.shards.manifest import ShardInfo
from data.shards.pieces import ShardPieces, cuts, read_pieces
from data.shards.scan import ShardRows, scan_shard
from data.sources.source import Reader


@dataclass(frozen=True)
class ShardTask:
    """Samples `ids` of a split's reader, to become shard `number`."""

    folder: Path
    split: str
    number: int
    first: int
    ids: np.ndarray

    @property
    def path(self) -> Path:
        return self.folder / self.split / f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class DoneShard:
    """A shard on disk, with what the manifest and the index will say of it."""

    split: str
    number: int
    info: ShardInfo
    rows: ShardRows
    pieces: ShardPieces


def shard_tasks(
    folder: Path, split: str, samples: int, shard_samples: int, seed: int
) -> list[ShardTask]:
    """Shuffle `samples` by `seed` and cut them in even shards of at most `shard_samples`."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, samples])).random_raw(samples)
    order = np.argsort(np.asarray(keys), kind="stable")
    parts = np.array_split(order, -(-samples // shard_samples))
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    return [ShardTask(folder, split, k, int(firsts[k]), part) for k, part in enumerate(parts)]


def finished_shard(
    readers: dict[str, Reader], task: ShardTask
) -> tuple[ShardTask, DoneShard | None]:
    """Rescan a shard an earlier run has written; None if it is missing or not what is wanted."""
    try:
        done = _scan(task)
    except (FileNotFoundError, DataError):
        return task, None
    wanted = readers[task.split].labels[task.ids]
    return task, done if np.array_equal(done.rows.label, wanted) else None


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of a packing; picklable, so that processes can share the work.

    `readers` go by split; `class_names`, one per label, are for the captions.
    """

    readers: dict[str, Reader]
    encoding: Encoding
    class_names: list[str]

    def __call__(self, task: ShardTask) -> DoneShard:
        """Write a shard under a temporary name, fsync, read it back, rename, scan.

        The bytes depend on the samples alone: headers have no time, owner or place in them. Raises
        DataError for a sample that cannot be packed, and for a disk that gives back other bytes
        than were written.
        """
        # Imported here since it brings torch, which nothing else in packing needs.
        from webdataset.writer import TarWriter

        reader = self.readers[task.split]
        with atomic_file(task.path) as stream:
            hashed: Any = _Hashed(stream)
            with TarWriter(hashed, mtime=0, encoder=False) as tar:
                for position, i in enumerate(task.ids):
                    tar.write(self._sample(reader, int(i), f"{task.first + position:08d}"))
            written = hashed.sha256.hexdigest()
            if _read_back(stream) != written:
                raise _bad_disk(task.path)
        return _scan(task, written)

    def _sample(self, reader: Reader, i: int, key: str) -> dict[str, Any]:
        content, extension, label = reader.read(i)
        if extension != "jpg" and self.encoding.refuses(content):
            raise DataError(
                f"{reader.where(i)} is transparent in places, where the colours below would show, "
                "often black on black; say what is behind with --background white (or another "
                "colour), or keep such images with --background none"
            )
        # Pillow has no one class for what may go wrong.
        try:
            image, extension = self.encoding.image(content, extension)
        except Exception as error:
            reason = said_by_pillow(error)
            raise DataError(
                f"{reader.where(i)} cannot be made smaller ({reason}); repair or remove it"
            ) from error
        sample: dict[str, Any] = {"__key__": key, extension: image, "cls": str(label).encode()}
        caption = self.encoding.caption(self.class_names[label])
        return sample if caption is None else sample | {"txt": caption}


class _Hashed:
    """A stream to write to that knows the SHA-256 of what was written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self._stream.write(content)


def _read_back(stream: Any) -> str:
    """Return the SHA-256 of a file as the disk has it."""
    stream.flush()
    os.fsync(stream.fileno())
    # Without this the kernel answers from memory.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _scan(task: ShardTask, written: str | None = None) -> DoneShard:
    """What is in a shard; `written` is the SHA-256 that it must have."""
    rows = scan_shard(task.path)
    size = task.path.stat().st_size
    pieces = read_pieces(task.path, cuts(rows.offset, size))
    if written not in (None, pieces.shard_sha256):
        raise _bad_disk(task.path)
    info = ShardInfo(
        name=task.path.name,
        samples=len(rows.label),
        bytes=size,
        sha256=pieces.shard_sha256,
    )
    return DoneShard(task.split, task.number, info, rows, pieces)


def _bad_disk(path: Path) -> DataError:
    return DataError(
        f"the disk gave back other bytes than were written for {path}; "
        "check the disk, then start the same packing again"
    )
