"""Cutting shards that are packed already, for machines that fetch no more than they read."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.errors import DataError
from data.processes import unordered
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, Manifest, load_manifest, verify_shards
from data.shards.pieces import ShardPieces, cuts, read_pieces, write_pieces

_Task = tuple[Path, list[int]]


def add_pieces(folder: Path, *, workers: int = 1, progress: bool = True) -> int:
    """Write the file of pieces for a split that is packed already; return how many there are.

    Shards, manifest and index stay as they are. Raises DataError where the shards are not those of
    the manifest, byte for byte.
    """
    manifest = load_manifest(folder)
    verify_shards(folder, manifest)
    tasks = _tasks(folder, manifest)
    found: dict[Path, ShardPieces] = {}
    bar = tqdm(
        unordered(_cut, tasks, workers), total=len(tasks), unit="shard", disable=not progress
    )
    for path, cut in bar:
        found[path] = cut
    for shard in manifest.shards:
        if found[folder / shard.name].shard_sha256 != shard.sha256:
            raise DataError(
                f"{folder / shard.name} has changed since it was packed (its SHA-256 differs); "
                "restore it, or pack or index the folder again"
            )
    ordered = [found[folder / shard.name] for shard in manifest.shards]
    write_pieces(folder, ordered)
    return sum(len(cut.ends) for cut in ordered)


def _tasks(folder: Path, manifest: Manifest) -> list[_Task]:
    index = SampleIndex.load(folder / INDEX_NAME)
    return [
        (folder / shard.name, cuts(index.offset[index.shard == number], shard.bytes))
        for number, shard in enumerate(manifest.shards)
    ]


def _cut(task: _Task) -> tuple[Path, ShardPieces]:
    return task[0], read_pieces(*task)
