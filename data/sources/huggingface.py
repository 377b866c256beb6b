"""Image data sets of the Hugging Face hub, as folders of parquet files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import DataError
from data.files import atomic_file, remove_leftovers
from data.processes import unordered
from data.shards.classes import numbered_classes
from data.sources.hub_files import find_files
from data.sources.source import Reader, Source, extension_of, hash_of_list
from data.sources.tar_reader import OpenFiles

_SCRATCH = ".rows"


@dataclass(frozen=True)
class Columns:
    """Where image and label are, and the names of the classes if the files say them."""

    image: str
    label: str
    classes: list[str] | None


@dataclass(frozen=True)
class ParquetReader:
    """The rows of a split's files, once `_copy_out` has copied their images.

    `files` are parquet files in the order of their rows, and `starts`, int64 [files + 1], the first
    row of each; `labels` is int64 [N]; the copies go to the folder `scratch`.
    """

    files: list[Path]
    starts: np.ndarray
    labels: np.ndarray
    scratch: Path
    _opened: OpenFiles = field(default_factory=OpenFiles)
    _bounds: dict[int, np.ndarray] = field(default_factory=dict)

    def read(self, i: int) -> tuple[bytes, str, int]:
        k, row = self._place(i)
        images, ends = _copies(self.scratch, k)
        if k not in self._bounds:
            self._bounds[k] = np.load(ends)
        first, last = self._bounds[k][row : row + 2].tolist()
        content = self._opened.read(images, first, last - first)
        return content, extension_of(content, self.where(i)), int(self.labels[i])

    def where(self, i: int) -> str:
        k, row = self._place(i)
        return f"row {row} of {self.files[k]}"

    def _place(self, i: int) -> tuple[int, int]:
        k = int(np.searchsorted(self.starts, i, side="right")) - 1
        return k, int(i - self.starts[k])

    def content_hash(self) -> str:
        sizes = [str(path.stat().st_size) for path in self.files]
        names = [path.name for path in self.files]
        return hash_of_list([*names, *sizes], self.labels)


def huggingface(
    folder: Path,
    out: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
) -> Source:
    """Return the train and validation splits of a data set downloaded as parquet files.

    Files are `…/train-00000-of-00294.parquet` or `…/train/0000.parquet`; val is the split
    called validation, val, valid or, failing those, test. A parquet file can only be read a group
    of rows at a time and shards are shuffled, so the images are first copied out of the files, each
    once, into a folder in `out` which is removed in the end. Labels go by the names of the classes,
    whose order may differ between files. Raises DataError where pyarrow or the files are missing,
    hold no images with labels, or are several configurations of which `config` names none.
    """
    chosen = find_files(folder, config)
    files, notes = chosen.splits, chosen.notes
    columns = _columns(files["train"][0], image_column, label_column)
    readers = {
        split: _reader(files[split], columns, out / _SCRATCH / split)
        for split in ("train", "val")
        if split in files
    }
    top = max(int(reader.labels.max()) for reader in readers.values())
    classes = columns.classes or numbered_classes(top + 1, f"column {columns.label!r} of {folder}")
    if top >= len(classes):
        raise DataError(f"{folder} has labels up to {top} but names only {len(classes)} classes")
    splits: dict[str, Reader] = dict(readers)
    return Source(
        "huggingface",
        folder.resolve().name,
        classes,
        splits,
        {"image_column": columns.image, "label_column": columns.label}
        | ({} if config is None else {"config": config}),
        prepare=partial(_copy_all, list(readers.values()), columns.image),
        scratch=out / _SCRATCH,
        notes=notes,
    )


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading parquet files needs pyarrow; install it with: "
            "pip install 'scl-train[huggingface]'"
        ) from error
    return pyarrow.parquet


def _opened(path: Path) -> Any:
    try:
        return _parquet().ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole parquet file ({error}); copy it again") from error


def _columns(path: Path, image: str | None, label: str | None) -> Columns:
    with _opened(path) as file:
        schema = file.schema_arrow
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    image = _column(path, schema.names, features, "Image", "image", image)
    label = _column(path, schema.names, features, "ClassLabel", "label", label)
    return Columns(image, label, features.get(label, {}).get("names"))


def _column(
    path: Path,
    names: Sequence[str],
    features: dict[str, Any],
    kind: str,
    usual: str,
    wanted: str | None,
) -> str:
    # A feature may also be a list of features.
    of_kind = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind
    ]
    column = wanted or (of_kind[0] if len(of_kind) == 1 else usual)
    if column not in names:
        raise DataError(
            f"{path} has no column {column!r} (it has {', '.join(names)}); name the one to use "
            f"with --{usual}-column"
        )
    return column


def _reader(files: list[Path], columns: Columns, scratch: Path) -> ParquetReader:
    labels = [_labels(path, columns) for path in files]
    starts = np.cumsum([0, *(len(part) for part in labels)])
    return ParquetReader(files, starts, np.concatenate(labels), scratch)


def _labels(path: Path, columns: Columns) -> np.ndarray:
    """The labels in a file, as numbers of the classes of the data set."""
    column = columns.label
    with _opened(path) as file:
        stored = file.read(columns=[column]).column(0)
    try:
        labels = np.asarray(stored.to_numpy(), np.float64)
        whole = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
    except (TypeError, ValueError):
        whole = np.zeros(1, bool)
        labels = whole
    if not whole.all():
        row = int(np.flatnonzero(~whole)[0])
        raise DataError(
            f"column {column!r} of {path} has no label in row {row} (integers from 0 are needed); "
            "is this a split without labels? name another column with --label-column"
        )
    labels = labels.astype(np.int64)
    own = _columns(path, columns.image, column).classes
    return labels if own in (None, columns.classes) else _by_name(path, labels, own, columns)


def _by_name(path: Path, labels: np.ndarray, own: list[str], columns: Columns) -> np.ndarray:
    """Numbers of `own` classes as those of the data set's classes of the same names."""
    number_of = {name: number for number, name in enumerate(columns.classes or [])}
    unknown = sorted(
        {own[label] for label in set(labels.tolist()) if label < len(own)} - number_of.keys()
    )
    if unknown or labels.max(initial=-1) >= len(own):
        raise DataError(
            f"{path} has classes that the first file of train has not "
            f"({', '.join(unknown[:5]) or 'labels without names'}); pack files of one data set"
        )
    return np.array([number_of.get(name, -1) for name in own], np.int64)[labels]


def _copies(scratch: Path, k: int) -> tuple[Path, Path]:
    return scratch / f"{k:05d}.bin", scratch / f"{k:05d}.ends.npy"


@dataclass(frozen=True)
class _Copy:
    """Write the images of file `k` of a split one after the other into `scratch`."""

    scratch: Path
    k: int
    path: Path


def _copy_all(readers: list[ParquetReader], column: str, workers: int, progress: bool) -> None:
    """Copy the images out of every file that an interrupted run has not finished."""
    tasks: list[_Copy] = []
    for reader in readers:
        reader.scratch.mkdir(parents=True, exist_ok=True)
        remove_leftovers(reader.scratch)
        tasks += [_Copy(reader.scratch, k, path) for k, path in enumerate(reader.files)]
    missing = [task for task in tasks if not _copies(task.scratch, task.k)[1].exists()]
    done = unordered(partial(_copy_out, column), missing, workers)
    bar = tqdm(
        done,
        total=len(tasks),
        initial=len(tasks) - len(missing),
        unit="file",
        desc="copying images out of parquet",
        smoothing=0,
        disable=not progress or not missing,
    )
    for _ in bar:
        pass


def _copy_out(column: str, task: _Copy) -> None:
    images, ends = _copies(task.scratch, task.k)
    bounds = [0]
    with atomic_file(images) as stream, _opened(task.path) as file:
        for group in range(file.num_row_groups):
            for content in _images(file, task.path, group, column, len(bounds) - 1):
                stream.write(content)
                bounds.append(bounds[-1] + len(content))
    # Last: it says that the copy is whole.
    with atomic_file(ends) as stream:
        np.save(stream, np.array(bounds, np.int64))


def _images(file: Any, path: Path, group: int, column: str, first_row: int) -> list[Any]:
    try:
        stored = file.read_row_group(group, columns=[column]).column(0).combine_chunks()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again") from error
    if hasattr(stored.type, "num_fields") and stored.type.num_fields:
        if stored.type.get_field_index("bytes") < 0:
            raise DataError(f"column {column!r} of {path} holds no image bytes; name another one")
        stored = stored.field("bytes")
    if stored.null_count:
        row = first_row + next(i for i, value in enumerate(stored) if not value.is_valid)
        raise DataError(f"row {row} of {path} has no image bytes; repair or remove it")
    return [memoryview(value.as_buffer()) for value in stored]
