"""Writing one shard: the unit of parallel packing and of resuming."""

import multiprocessing
import multiprocessing.process
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import atomic_file, sha256_of
from data.index import ShardRows, scan_shard
from data.manifest import ShardInfo
from data.sources import Reader


@dataclass(frozen=True)
class ShardTask:
    """Samples ``ids`` of a split's reader, to become shard ``number``."""

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


def shard_tasks(
    folder: Path, split: str, samples: int, shard_samples: int, seed: int
) -> list[ShardTask]:
    """Shuffle ``samples`` by ``seed`` and cut them in even shards of at most ``shard_samples``."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, samples])).random_raw(samples)
    order = np.argsort(np.asarray(keys), kind="stable")
    parts = np.array_split(order, -(-samples // shard_samples))
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    return [ShardTask(folder, split, k, int(firsts[k]), part) for k, part in enumerate(parts)]


def finished_shard(task: ShardTask, reader: Reader) -> DoneShard | None:
    """Rescan a shard an earlier run has written; None if it is missing or not what is wanted."""
    try:
        done = _scan(task)
    except (FileNotFoundError, DataError):
        return None
    return done if np.array_equal(done.rows.label, reader.labels[task.ids]) else None


def write_shard(task: ShardTask, reader: Reader) -> DoneShard:
    """Write a shard under a temporary name, fsync, rename, scan.

    The bytes depend on the samples alone: headers have no time, owner or place in them.

    Raises:
        DataError: the reader met something that cannot be packed.
    """
    # Imported here since it brings torch, which nothing else in packing needs.
    from webdataset.writer import TarWriter

    with atomic_file(task.path) as stream, TarWriter(stream, mtime=0, encoder=False) as tar:
        for position, i in enumerate(task.ids):
            image, extension, label = reader.read(int(i))
            key = f"{task.first + position:08d}"
            tar.write({"__key__": key, extension: image, "cls": str(label).encode()})
    return _scan(task)


def _scan(task: ShardTask) -> DoneShard:
    rows = scan_shard(task.path)
    info = ShardInfo(
        name=task.path.name,
        samples=len(rows.label),
        bytes=task.path.stat().st_size,
        sha256=sha256_of(task.path),
    )
    return DoneShard(task.split, task.number, info, rows)


_readers: dict[str, Reader] = {}


def start_worker(readers: dict[str, Reader]) -> None:
    """Prepare a packing process: it gets the readers once, and dies with its parent."""
    _readers.update(readers)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    # A killed parent leaves pool processes waiting for work for ever.
    parent.join()
    os._exit(1)


def write_shard_in_worker(task: ShardTask) -> DoneShard:
    """``write_shard`` with the reader given to ``start_worker``."""
    return write_shard(task, _readers[task.split])
