"""Class folders and the images in them, in the same order every time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.shards.scan import IMAGE_EXTENSIONS, OTHER_IMAGE_EXTENSIONS
from data.sources.left_out import Collector, some
from data.sources.source import FileReader

# What a Mac leaves in archives beside the folders.
_NO_FOLDERS = {"__MACOSX"}


def folders_in(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted; hidden ones are nobody's classes."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name was not put there by the owner of the images."""
    return name.startswith(".") or name in _NO_FOLDERS


def class_folders(root: Path) -> list[str]:
    """The names of the classes in `root`, sorted. Raises DataError where there are none."""
    names = folders_in(root)
    if not names:
        raise DataError(
            f"{root} has no class folders; images are expected in {root}/<class>/<image>.jpg"
        )
    return names


def readable(name: str) -> str:
    """The name of a file as text: UTF-8, whatever encoding the locale has, if its bytes are that.

    So that a class is called the same by machines of other locales.
    """
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return name


def list_images(
    root: Path,
    classes: Sequence[str],
    *,
    all_filled: bool,
    left_out: Collector | None = None,
    extensions: frozenset[str] = IMAGE_EXTENSIONS,
) -> FileReader:
    """The images in the folders of `classes`, by class and name; what they are not is noted.

    Raises DataError where there are none, and where one of `all_filled` classes has none.
    """
    left_out = Collector() if left_out is None else left_out
    names: list[str] = []
    labels: list[int] = []
    stamps: list[tuple[int, int]] = []
    for label, class_name in enumerate(classes):
        of_class = sorted(_images_below(root, class_name, extensions, left_out))
        if all_filled and not of_class:
            kinds = ", ".join(sorted(extensions))
            raise DataError(
                f"the class folder {root / class_name} holds no images ({kinds}); "
                "fill it or remove it"
            )
        names += [name for name, _ in of_class]
        stamps += [stamp for _, stamp in of_class]
        labels += [label] * len(of_class)
    if not names:
        raise DataError(f"{root} holds no images; fill it or remove it")
    return FileReader(root, names, np.array(labels, np.int64), np.array(stamps, np.int64))


def check_not_empty(reader: FileReader) -> None:
    """Raise DataError for images of no bytes, which are known without reading them."""
    sizes = np.ones(1) if reader.stamps is None else reader.stamps[:, 0]
    empty = [reader.names[i] for i in np.flatnonzero(sizes == 0)]
    if empty:
        raise DataError(
            f"{len(empty):,} of {len(reader.names):,} images in {reader.root} have no bytes "
            f"({some(empty)}); copy them again or remove them"
        )


def _images_below(
    root: Path, class_name: str, extensions: frozenset[str], left_out: Collector
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The images in a folder and those below it: name from `root` on, size and time of change."""
    seen: set[tuple[int, int]] = set()
    waiting = [class_name] if (root / class_name).is_dir() else []
    while waiting:
        folder = waiting.pop(0)
        status = (root / folder).stat()
        # A link may lead to a folder that has been read, even to one that holds it.
        if (status.st_dev, status.st_ino) in seen:
            left_out.add("links to folders that were read already", folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        folders = [entry for entry in inside if entry.is_dir() and not is_hidden(entry.name)]
        # Folders before links to them, so that a sample has the name of its place.
        folders.sort(key=lambda entry: entry.is_symlink())
        waiting += [f"{folder}/{entry.name}" for entry in folders]
        for entry in inside:
            if not entry.is_dir() or is_hidden(entry.name):
                yield from _image(f"{folder}/{entry.name}", entry, extensions, left_out)


def _image(
    name: str, entry: os.DirEntry[str], extensions: frozenset[str], left_out: Collector
) -> Iterator[tuple[str, tuple[int, int]]]:
    _, dot, extension = entry.name.rpartition(".")
    if is_hidden(entry.name):
        left_out.add("hidden files and folders", name)
    elif not dot or extension.lower() not in extensions:
        if extension.lower() in OTHER_IMAGE_EXTENSIONS:
            left_out.add("in formats that are not read", name, images=1)
        else:
            left_out.add("that are no images by their names", name)
    else:
        try:
            status = entry.stat()
        except FileNotFoundError:
            left_out.add("links that lead nowhere", name, images=1)
            return
        yield name, (status.st_size, status.st_mtime_ns)
