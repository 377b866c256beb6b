"""Which files a packing was made of: to say what has been added, and to notice what has changed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import atomic_file
from data.packing.encoding import Encoding
from data.packing.writer import ShardTask
from data.processes import unordered
from data.shards.scan import scan_shard
from data.sources.left_out import some
from data.sources.source import Reader, Source

ORIGIN_NAME = "origin.npz"


def note_origin(out: Path, source: Source) -> None:
    """Write names, labels, sizes and times of change of the files of `source` to `out`.

    A source that is not files has nothing to note.
    """
    _note(out, _columns(source))


def _note(out: Path, columns: Mapping[str, Any]) -> None:
    if columns:
        with atomic_file(out / ORIGIN_NAME) as stream:
            np.savez_compressed(stream, **columns)


def _columns(source: Source) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for split, reader in source.splits.items():
        names, stamps = getattr(reader, "names", None), getattr(reader, "stamps", None)
        if names is None or stamps is None:
            continue
        stored = [os.fsencode(name) for name in names] if isinstance(names, list) else names
        columns |= {
            f"{split} names": np.array(stored, "S"),
            f"{split} labels": np.asarray(reader.labels),
            f"{split} stamps": stamps,
        }
    if columns:
        columns["classes"] = np.array([name.encode() for name in source.classes], "S")
    return columns


def _noted(out: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(out / ORIGIN_NAME, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def difference(out: Path, source: Source) -> str | None:
    """In words, which images and classes are not those that `out` was begun with."""
    before, now = _noted(out), _columns(source)
    if not before or not now:
        return None
    said: list[str] = []
    there, here = ({name.decode() for name in set_["classes"].tolist()} for set_ in (before, now))
    for what, names in (("new classes", here - there), ("classes gone", there - here)):
        if names:
            said.append(f"{what}: {some(sorted(names))}")
    for split in sorted({key.split()[0] for key in [*before, *now] if " " in key}, reverse=True):
        said += _differences_of_split(split, before, now)
    return "; ".join(said) or None


def _differences_of_split(
    split: str, before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]
) -> list[str]:
    there, here = (
        {} if f"{split} names" not in side else _class_of(split, side) for side in (before, now)
    )
    moved = [name for name in here.keys() & there.keys() if here[name] != there[name]]
    kinds = {
        "more": here.keys() - there.keys(),
        "fewer": there.keys() - here.keys(),
        "in another class": moved,
    }
    return [
        f"{len(names):,} images {kind} in {split} ({some(sorted(names))})"
        for kind, names in kinds.items()
        if names
    ]


def _class_of(split: str, columns: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    names = (os.fsdecode(name) for name in columns[f"{split} names"].tolist())
    return dict(zip(names, columns["classes"][columns[f"{split} labels"]].tolist(), strict=True))


def refuse_changed(
    out: Path, source: Source, tasks: list[ShardTask], encoding: Encoding, workers: int
) -> None:
    """Compare the files that may have changed since `out` was begun with what is packed of them.

    Raises DataError, naming them, if any has other bytes than its sample.
    """
    before, now = _noted(out), _columns(source)
    suspects = {}
    for split in source.splits:
        stamps = now.get(f"{split} stamps")
        then = before.get(f"{split} stamps")
        if stamps is None or then is None or np.array_equal(stamps, then):
            continue
        suspects[split] = np.ones(len(source.splits[split].labels), bool)
        if stamps.shape == then.shape and len(stamps) == len(suspects[split]):
            suspects[split] = (stamps != then).any(axis=1)
    if suspects:
        compare = _Comparison(source.splits, encoding, suspects)
        packed = [task for task in tasks if task.split in suspects and task.path.exists()]
        changed = [name for names in unordered(compare, packed, workers) for name in names]
        if changed:
            raise DataError(
                f"{len(changed):,} images have changed since they were packed into {out} "
                f"({some(sorted(changed))}); remove it or choose another --out to pack them anew"
            )
    if suspects or not before:
        _note(out, now)


@dataclass(frozen=True)
class _Comparison:
    """Compares the samples of a shard with the files they were made of; picklable."""

    readers: dict[str, Reader]
    encoding: Encoding
    suspects: dict[str, np.ndarray]

    def __call__(self, task: ShardTask) -> list[str]:
        """Where the samples come from that are other than their files."""
        asked = self.suspects[task.split][task.ids]
        if not asked.any():
            return []
        try:
            rows = scan_shard(task.path)
        except DataError:
            return []
        if len(rows.label) != len(task.ids):
            # Not whole, so packed again anyway.
            return []
        reader = self.readers[task.split]
        changed = []
        with task.path.open("rb") as stream:
            read = partial(os.pread, stream.fileno())
            for position in np.flatnonzero(asked).tolist():
                sample = int(task.ids[position])
                content, extension, _ = reader.read(sample)
                wanted, _ = self.encoding.image(content, extension)
                if read(int(rows.size[position]), int(rows.offset[position])) != wanted:
                    changed.append(reader.where(sample))
        return changed
