"""Packing a source into shards: parallel, resumable, the same bytes every time."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import DataError
from data.files import sha256_of
from data.packing.claim import claimed
from data.packing.encoding import AS_IT_IS, Encoding
from data.packing.origin import refuse_changed
from data.packing.stats import measure
from data.packing.summary import check_against_source
from data.packing.timm_info import write_timm_info
from data.packing.writer import DoneShard, ShardTask, ShardWriter, finished_shard, shard_tasks
from data.processes import unordered
from data.shards.index import SampleIndex
from data.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    ImageStats,
    Manifest,
    load_manifest,
    verify_shards,
    write_manifest,
)
from data.shards.pieces import write_pieces
from data.sources.source import Reader, Source

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
    encoding: Encoding = AS_IT_IS,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Write `out/<split>/` for each split of `source`: shards, index, manifest.

    The same source, seed, shard size and encoding give the same bytes, whatever the number of
    `workers` (processes) and interruptions. A killed packing goes on where it was; a complete one
    is left as it is. The val manifest carries the statistics of train. Raises DataError for bad
    options, for a sample that cannot be packed, and where `out` holds something else.
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
        "options": source.options | encoding.described(),
        "seed": seed,
        "shard_samples": shard_samples,
        "fingerprint": source.fingerprint(),
    }
    with claimed(out, description, source):
        tasks = _tasks(source, out, description)
        refuse_changed(out, source, tasks, encoding, workers)
        complete = _complete_manifests(out, source)
        if complete is not None:
            _log.info("%s is packed already and complete: nothing to do", out)
            return complete
        return _pack_claimed(source, out, description, tasks, encoding, workers, progress)


def _tasks(source: Source, out: Path, description: dict[str, Any]) -> list[ShardTask]:
    tasks: list[ShardTask] = []
    for split, samples in source.samples().items():
        size = description["shard_samples"] or default_shard_samples(samples)
        tasks += shard_tasks(out, split, samples, size, description["seed"])
    return tasks


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
    source: Source,
    out: Path,
    description: dict[str, Any],
    tasks: list[ShardTask],
    encoding: Encoding,
    workers: int,
    progress: bool,
) -> dict[str, Manifest]:
    finished = _found_shards(tasks, source.splits, workers, progress)
    missing = [task for task in tasks if task.path not in finished]
    shards = list(finished.values())
    if missing and source.prepare is not None:
        source.prepare(workers, progress)
    with tqdm(
        total=sum(source.samples().values()),
        # Not progress of this run: counted as such it would falsify the time left.
        initial=sum(shard.info.samples for shard in shards),
        unit="img",
        desc="packing",
        # Shards arrive in bursts: only the mean speed says something about the time left.
        smoothing=0,
        disable=not progress,
    ) as bar:
        write = ShardWriter(source.splits, encoding, source.class_names or source.classes)
        for shard in unordered(write, missing, workers):
            shards.append(shard)
            bar.update(shard.info.samples)
    done = {split: [s for s in shards if s.split == split] for split in source.splits}
    manifests = _write_manifests(source, out, description, done, workers)
    if source.scratch is not None:
        shutil.rmtree(source.scratch, ignore_errors=True)
    return manifests


def _found_shards(
    tasks: list[ShardTask], readers: dict[str, Reader], workers: int, progress: bool
) -> dict[Path, DoneShard]:
    """Rescan what an interrupted run has finished."""
    existing = [task for task in tasks if task.path.exists()]
    rescanned = unordered(partial(finished_shard, readers), existing, workers)
    quiet = not progress or not existing
    bar = tqdm(rescanned, total=len(existing), unit="shard", desc="found", disable=quiet)
    return {task.path: shard for task, shard in bar if shard is not None}


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
    for split, index in indices.items():
        check_against_source(out / split, index, source.splits[split].labels)
    for split in sorted(done, key=lambda name: name != "train"):
        infos = [shard.info for shard in sorted(done[split], key=lambda shard: shard.number)]
        if stats is None:
            stats = measure(out / split, [info.name for info in infos], indices[split], workers)
        manifests[split] = Manifest(
            dataset=source.name,
            split=split,
            samples=len(indices[split]),
            classes=source.classes,
            class_names=source.class_names,
            image=stats,
            shards=infos,
            index_sha256=sha256_of(out / split / INDEX_NAME),
            source=description,
        )
    write_timm_info(out, manifests)
    for split, manifest in manifests.items():
        write_manifest(out / split, manifest)
    return manifests


def _write_index(folder: Path, shards: list[DoneShard]) -> SampleIndex:
    ordered = sorted(shards, key=lambda shard: shard.number)
    index = SampleIndex.from_rows([shard.rows for shard in ordered])
    index.save(folder / INDEX_NAME)
    write_pieces(folder, [shard.pieces for shard in ordered])
    return index
