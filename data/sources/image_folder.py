"""Folders of images, one per class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.shards.index import IMAGE_EXTENSIONS
from data.sources.source import FileReader, Reader, Source, held_out


def imagefolder(folder: Path, val_fraction: float | None = None) -> Source:
    """Return `folder/train/<class>/…` and `folder/val/<class>/…`, or `folder/<class>/…`.

    `val_fraction` (0 to 1) holds out a fixed part of each class where there is no val folder.
    Raises DataError where the folder or its images are missing, val has a class that train has not,
    or `val_fraction` cannot be applied.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give the one that holds train/ and val/")
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = class_folders(root)
    train = list_images(root, classes, all_filled=True)
    splits: dict[str, Reader] = {"train": train}
    if root != folder and (folder / "val").is_dir():
        if val_fraction is not None:
            raise DataError(f"{folder} has a val folder already; leave out val_fraction")
        unknown = sorted(set(class_folders(folder / "val")) - set(classes))
        if unknown:
            raise DataError(
                f"{folder / 'val'} has classes that {root} has not ({', '.join(unknown[:5])}); "
                "give both the same class folders"
            )
        splits["val"] = list_images(folder / "val", classes, all_filled=False)
    elif val_fraction is not None:
        splits["train"], splits["val"] = _split_files(train, val_fraction)
    options = {} if val_fraction is None else {"val_fraction": val_fraction}
    return Source("imagefolder", folder.resolve().name, classes, splits, options)


def class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(
            f"{root} has no class folders; images are expected in {root}/<class>/<image>.jpg"
        )
    return names


def list_images(root: Path, classes: Sequence[str], *, all_filled: bool) -> FileReader:
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        of_class = sorted(_images_below(root, class_name))
        if all_filled and not of_class:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise DataError(
                f"the class folder {root / class_name} holds no images ({kinds}); "
                "fill it or remove it"
            )
        names += of_class
        labels += [label] * len(of_class)
    if not names:
        raise DataError(f"{root} holds no images; fill it or remove it")
    return FileReader(root, names, np.array(labels, np.int64))


def _images_below(root: Path, class_name: str) -> list[str]:
    return [
        os.path.relpath(Path(folder) / name, root)
        for folder, _, names in os.walk(root / class_name, followlinks=True)
        for name in names
        if not name.startswith(".")
        and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        and "." in name
    ]


def _split_files(reader: FileReader, val_fraction: float) -> tuple[FileReader, FileReader]:
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    try:
        parts = held_out(reader.labels, val_fraction)
    except ValueError as error:
        raise DataError(
            f"val_fraction {val_fraction} cannot be held out of {reader.root} ({error}); "
            "each class needs at least two images, and both parts one image of each class"
        ) from error
    train, val = (
        FileReader(reader.root, [reader.names[i] for i in part], reader.labels[part])
        for part in parts
    )
    return train, val
