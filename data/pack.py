"""Packing a source into shards: parallel, resumable, the same bytes every time."""

import contextlib
import fcntl
import json
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.adopt import index_shards
from data.errors import DataError
from data.files import atomic_file, remove_leftovers, sha256_of
from data.index import SampleIndex
from data.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    ImageStats,
    Manifest,
    load_manifest,
    verify_shards,
    write_manifest,
)
from data.shards import (
    DoneShard,
    ShardTask,
    finished_shard,
    shard_tasks,
    start_worker,
    write_shard,
    write_shard_in_worker,
)
from data.sources import Reader, Source
from data.stats import measure

__all__ = ["default_shard_samples", "index_shards", "pack"]

PACKING_NAME = "packing.json"
_log = logging.getLogger("data")


def default_shard_samples(samples: int) -> int:
    """Return the shard size for a split: about 16 shards, of 64 to 5,000 samples."""
    return min(max(samples // 16, 64), 5_000)


def pack(
    source: Source,
    out: Path,
    *,
    shard_samples: int | None = None,
    seed: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Write ``out/<split>/`` for each split of ``source``: shards, index, manifest.

    The same source, seed and shard size give the same bytes, whatever the number of
    ``workers`` (processes) and interruptions. A killed packing goes on where it was; a
    complete one is left as it is. The val manifest carries the statistics of train.

    Raises:
        DataError: bad options, a sample that cannot be packed, or ``out`` holds something else.
    """
    if shard_samples is not None and shard_samples < 1:
        raise DataError(f"shard_samples is {shard_samples}; it must be at least 1")
    if workers < 1:
        raise DataError(f"workers is {workers}; packing needs at least 1")
    if seed < 0:
        raise DataError(f"the packing seed is {seed}; it must be 0 or more")
    description = {
        "kind": source.kind,
        "name": source.name,
        "options": source.options,
        "seed": seed,
        "shard_samples": shard_samples,
        "fingerprint": source.fingerprint(),
    }
    with _claimed(out, description, list(source.splits)):
        complete = _complete_manifests(out, source)
        if complete is not None:
            _log.info("%s is packed already and complete: nothing to do", out)
            return complete
        return _pack_claimed(source, out, description, workers, progress)


@contextlib.contextmanager
def _claimed(out: Path, description: dict[str, Any], splits: list[str]) -> Iterator[None]:
    """Hold ``out`` for this packing alone; refuse a folder that holds another one."""
    path = out / PACKING_NAME
    if not path.exists():
        for split in splits:
            _refuse_foreign(out / split)
            (out / split).mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            stream.write(json.dumps(description, indent=1).encode() + b"\n")
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is packing into {out}; wait for it or choose another --out"
            ) from error
        _refuse_other(out, stream.read(), description)
        for split in splits:
            (out / split).mkdir(exist_ok=True)
            remove_leftovers(out / split)
        yield


def _refuse_foreign(folder: Path) -> None:
    if (folder / MANIFEST_NAME).exists() or any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards that were not packed here; remove it or choose another --out"
        )


def _refuse_other(out: Path, stored: bytes, description: dict[str, Any]) -> None:
    try:
        found = json.loads(stored)
    except ValueError:
        found = {}
    if not isinstance(found, dict):
        found = {}
    differing = [key for key in description if found.get(key) != description[key]]
    if differing:
        raise DataError(
            f"{out} holds another packing ({', '.join(differing)} differ); "
            "remove it or choose another --out"
        )


def _complete_manifests(out: Path, source: Source) -> dict[str, Manifest] | None:
    folders = {split: out / split for split in source.splits}
    if not all((folder / MANIFEST_NAME).exists() for folder in folders.values()):
        return None
    try:
        manifests = {split: load_manifest(folder) for split, folder in folders.items()}
        for split, manifest in manifests.items():
            verify_shards(folders[split], manifest)
    except DataError as error:
        _log.warning("repairing a packing that was complete: %s", error)
        return None
    return manifests


def _pack_claimed(
    source: Source, out: Path, description: dict[str, Any], workers: int, progress: bool
) -> dict[str, Manifest]:
    tasks: list[ShardTask] = []
    for split, samples in source.samples().items():
        size = description["shard_samples"] or default_shard_samples(samples)
        tasks += shard_tasks(out, split, samples, size, description["seed"])
    found = _found_shards(tasks, source.splits, progress)
    missing = [task for task in tasks if task.path not in found]
    shards = list(found.values())
    with tqdm(
        total=sum(source.samples().values()),
        # Not progress of this run: counted as such it would falsify the time left.
        initial=sum(shard.info.samples for shard in shards),
        unit="img",
        desc="packing",
        disable=not progress,
    ) as bar:
        write = _in_processes if workers > 1 and len(missing) > 1 else _in_this_process
        for shard in write(missing, source.splits, workers):
            shards.append(shard)
            bar.update(shard.info.samples)
    done = {split: [s for s in shards if s.split == split] for split in source.splits}
    return _write_manifests(source, out, description, done, workers)


def _found_shards(
    tasks: list[ShardTask], readers: dict[str, Reader], progress: bool
) -> dict[Path, DoneShard]:
    """Rescan what an interrupted run has finished."""
    existing = [task for task in tasks if task.path.exists()]
    found: dict[Path, DoneShard] = {}
    quiet = not progress or not existing
    for task in tqdm(existing, unit="shard", desc="found", disable=quiet):
        shard = finished_shard(task, readers[task.split])
        if shard is not None:
            found[task.path] = shard
    return found


def _in_this_process(
    tasks: list[ShardTask], readers: dict[str, Reader], workers: int
) -> Iterable[DoneShard]:
    del workers
    return (write_shard(task, readers[task.split]) for task in tasks)


def _in_processes(
    tasks: list[ShardTask], readers: dict[str, Reader], workers: int
) -> Iterable[DoneShard]:
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(readers,),
    )
    try:
        for future in as_completed([pool.submit(write_shard_in_worker, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process died (killed, or out of memory?); "
            "start the same packing again with fewer workers, it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_manifests(
    source: Source,
    out: Path,
    description: dict[str, Any],
    done: dict[str, list[DoneShard]],
    workers: int,
) -> dict[str, Manifest]:
    manifests: dict[str, Manifest] = {}
    stats: ImageStats | None = None
    # A manifest says "complete", so they come after everything else of every split.
    indices = {split: _write_index(out / split, shards) for split, shards in done.items()}
    for split in sorted(done, key=lambda name: name != "train"):
        infos = [shard.info for shard in sorted(done[split], key=lambda shard: shard.number)]
        if stats is None:
            stats = measure(out / split, [info.name for info in infos], indices[split], workers)
        manifests[split] = Manifest(
            dataset=source.name,
            split=split,
            samples=len(indices[split]),
            classes=source.classes,
            image=stats,
            shards=infos,
            index_sha256=sha256_of(out / split / INDEX_NAME),
            source=description,
        )
    for split, manifest in manifests.items():
        write_manifest(out / split, manifest)
    return manifests


def _write_index(folder: Path, shards: list[DoneShard]) -> SampleIndex:
    ordered = sorted(shards, key=lambda shard: shard.number)
    index = SampleIndex.from_rows([shard.rows for shard in ordered])
    index.save(folder / INDEX_NAME)
    return index
