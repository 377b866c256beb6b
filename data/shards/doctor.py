"""Checking packed shards to the last image: manifest, index, tars, checksums, labels, decoding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.errors import DataError
from data.files import explained, sha256_of
from data.images.decode import CorruptImage, decode
from data.processes import unordered
from data.shards.class_order import is_sorted_by_class
from data.shards.index import SampleIndex, key_at
from data.shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from data.shards.pieces import (
    PIECES_NAME,
    ShardPieces,
    parse_pieces,
    pieces_of,
    read_pieces,
)
from data.shards.scan import ShardRows, scan_shard

_WORTH_PROCESSES = 64 << 20


@dataclass(frozen=True)
class Problem:
    """What is wrong: with a sample of a shard, or, `key` being empty, with a whole file."""

    file: Path
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{self.key and f' {self.key}'}: {self.reason}"


@dataclass(frozen=True)
class Diagnosis:
    """The outcome for one split. Notes are no problems, but worth knowing."""

    folder: Path
    samples: int
    shards: int
    problems: list[Problem]
    notes: list[str]


@dataclass(frozen=True)
class _Result:
    """What was found in one shard."""

    info: ShardInfo
    problems: list[Problem]
    left_out: list[tuple[str, str]]


@dataclass(frozen=True)
class _Task:
    info: ShardInfo
    rows: ShardRows | None
    pieces: ShardPieces | None


def find_splits(folder: Path) -> list[Path]:
    """Return the splits in a folder: itself, or those of its folders that hold shards.

    Raises DataError where there are none.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name one that holds shards")
    splits = [path for path in (folder, *sorted(folder.iterdir())) if _holds_shards(path)]
    if not splits:
        raise DataError(
            f"{folder} holds no shards, neither itself nor in its folders; "
            "name the folder that has train/ and val/"
        )
    return splits


def _holds_shards(path: Path) -> bool:
    return path.is_dir() and ((path / MANIFEST_NAME).exists() or any(path.glob("*.tar")))


def examine(
    folder: Path, *, quick: bool = False, workers: int = 1, progress: bool = True
) -> Diagnosis:
    """Check one split, shard by shard in `workers` processes.

    `quick` looks at manifest, index, and the presence and sizes of shards; otherwise every
    byte is read: checksums, the index against the tars, and every image is decoded.
    """
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return Diagnosis(folder, 0, 0, [Problem(folder / MANIFEST_NAME, "", str(error))], [])
    index, problems = _check_index(folder, manifest)
    problems += _unlisted(folder, manifest)
    pieces, of_pieces = _check_pieces(folder, manifest)
    problems += of_pieces
    tasks = _tasks(manifest, index, pieces)
    check = functools.partial(_check_shard, folder, manifest, quick)
    results: list[_Result] = []
    total = sum(shard.bytes for shard in manifest.shards)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc=f"checking {folder.name}", disable=not progress
    )
    with bar:
        # Below that, processes take longer to start than to check.
        processes = 1 if quick or total < _WORTH_PROCESSES else workers
        for result in unordered(check, tasks, processes):
            results.append(result)
            bar.update(result.info.bytes)
    results.sort(key=lambda result: result.info.name)
    problems += [problem for result in results for problem in result.problems]
    notes = _notes_on_left_out(results)
    if index is not None and is_sorted_by_class(index.label):
        notes.append("samples are sorted by class, which mixes badly; pack them again, shuffled")
    return Diagnosis(folder, manifest.samples, len(manifest.shards), problems, notes)


def _notes_on_left_out(results: list[_Result]) -> list[str]:
    places: dict[str, list[str]] = {}
    for result in results:
        for why, name in result.left_out:
            places.setdefault(why, []).append(f"{name} in {result.info.name}")
    return [
        f"{len(names):,} images are no samples, {why}: {names[0]}{' …' * (len(names) > 1)}"
        for why, names in places.items()
    ]


def _check_index(folder: Path, manifest: Manifest) -> tuple[SampleIndex | None, list[Problem]]:
    path = folder / INDEX_NAME
    try:
        index = SampleIndex.load(path)
    except DataError as error:
        return None, [Problem(path, "", _without(error, path))]
    problems = []
    if sha256_of(path) != manifest.index_sha256:
        problems.append(Problem(path, "", "it is not the one the manifest was written with"))
    sizes = [shard.samples for shard in manifest.shards]
    if sum(sizes) != manifest.samples:
        reason = f"its shards have {sum(sizes)} samples, but it claims {manifest.samples}"
        problems.append(Problem(folder / MANIFEST_NAME, "", reason))
    if np.bincount(index.shard, minlength=len(sizes)).tolist() != sizes:
        reason = "its samples per shard are not those of the manifest"
        return None, [*problems, Problem(path, "", reason)]
    return index, problems


def _check_pieces(
    folder: Path, manifest: Manifest
) -> tuple[list[ShardPieces] | None, list[Problem]]:
    path = folder / PIECES_NAME
    if not path.is_file():
        return None, []
    try:
        pieces = parse_pieces(path.read_bytes(), str(path))
    except DataError as error:
        return None, [Problem(path, "", _without(error, path))]
    if pieces_of(manifest.shards, pieces) is None:
        fix = f"write it anew with `scl pack pieces {folder}`"
        return None, [Problem(path, "", f"it is of other shards; {fix}")]
    return pieces, []


def _unlisted(folder: Path, manifest: Manifest) -> list[Problem]:
    listed = {shard.name for shard in manifest.shards}
    others = sorted(path for path in folder.glob("*.tar") if path.name not in listed)
    reason = f"the manifest does not list it; remove it, or run `scl pack index {folder}`"
    return [Problem(path, "", reason) for path in others]


def _tasks(
    manifest: Manifest, index: SampleIndex | None, pieces: list[ShardPieces] | None
) -> list[_Task]:
    ends = np.cumsum([shard.samples for shard in manifest.shards]).tolist()
    tasks = []
    for number, (info, end) in enumerate(zip(manifest.shards, ends, strict=True)):
        first = end - info.samples
        rows = None
        if index is not None:
            columns = (index.offset, index.size, index.label)
            offset, size, label = (column[first:end] for column in columns)
            rows = ShardRows(offset, size, label)
        tasks.append(_Task(info, rows, None if pieces is None else pieces[number]))
    return tasks


def _check_shard(folder: Path, manifest: Manifest, quick: bool, task: _Task) -> _Result:
    path = folder / task.info.name
    try:
        with explained(path):
            return _examined(path, manifest, quick, task)
    except DataError as error:
        return _Result(task.info, [Problem(path, "", _without(error, path))], [])


def _examined(path: Path, manifest: Manifest, quick: bool, task: _Task) -> _Result:
    left_out: list[tuple[str, str]] = []
    problems = _file_problems(path, task, quick)
    if quick or not path.is_file():
        return _Result(task.info, problems, left_out)
    try:
        rows = scan_shard(path, _label_field(manifest))
    except DataError as error:
        problems.append(Problem(path, "", _without(error, path)))
        rows = task.rows
    else:
        left_out = rows.left_out
        if task.rows is not None and not _equal(rows, task.rows):
            problems.append(Problem(path, "", f"{INDEX_NAME} does not describe what it holds"))
    if rows is not None:
        problems += _sample_problems(path, rows, manifest)
    return _Result(task.info, problems, left_out)


def _without(error: DataError, path: Path) -> str:
    """The sentence without the place, with which a line begins anyway."""
    return str(error).replace(f"{path} ", "it ", 1)


def _label_field(manifest: Manifest) -> str | None:
    return str(manifest.source.get("label_from", "")).partition(":")[2] or None


def _file_problems(path: Path, task: _Task, quick: bool) -> list[Problem]:
    if not path.is_file():
        return [Problem(path, "", "it is missing")]
    size = path.stat().st_size
    if size != task.info.bytes:
        return [Problem(path, "", f"it has {size} bytes instead of {task.info.bytes}")]
    if quick:
        return []
    found = read_pieces(path, [size] if task.pieces is None else task.pieces.ends)
    if found.shard_sha256 != task.info.sha256:
        return [Problem(path, "", "it has changed since it was packed (its SHA-256 differs)")]
    if task.pieces not in (None, found):
        fix = f"write that anew with `scl pack pieces {path.parent}`"
        return [Problem(path, "", f"{PIECES_NAME} does not describe it; {fix}")]
    return []


def _equal(a: ShardRows, b: ShardRows) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in ((a.offset, b.offset), (a.size, b.size), (a.label, b.label))
    )


def _sample_problems(path: Path, rows: ShardRows, manifest: Manifest) -> Iterator[Problem]:
    beyond = 0
    with path.open("rb") as stream:
        for offset, size, label in zip(
            rows.offset.tolist(), rows.size.tolist(), rows.label.tolist(), strict=True
        ):
            stream.seek(offset)
            content = stream.read(size)
            if len(content) < size:
                beyond += 1
            elif (reason := _sample_problem(content, label, manifest)) is not None:
                yield Problem(path, _key(path, offset), reason)
    if beyond:
        yield Problem(path, "", f"{beyond:,} of its {len(rows.label):,} samples are beyond its end")


def _sample_problem(content: bytes, label: int, manifest: Manifest) -> str | None:
    try:
        decode(content, manifest.image.channels)
    except CorruptImage as error:
        return str(error)
    if not 0 <= label < len(manifest.classes):
        return f"its label is {label}, but there are {len(manifest.classes)} classes"
    return None


def _key(path: Path, offset: int) -> str:
    try:
        return key_at(path, offset)
    except (DataError, OSError):
        return f"at byte {offset}"
