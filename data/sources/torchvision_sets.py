"""Sets of torchvision, from its files on disk or downloaded by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from data.errors import DataError
from data.sources.listing import list_images
from data.sources.source import ArrayReader, Reader, Source

_ARRAY_SETS = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")
_IMAGENETTE_FOLDERS = {
    "full": "imagenette2",
    "320px": "imagenette2-320",
    "160px": "imagenette2-160",
}
TORCHVISION_SETS = (*_ARRAY_SETS, "Imagenette")


def torchvision_set(name: str, root: Path, size: str = "full") -> Source:
    """Return a set of torchvision, from `root` or, where it is not there, downloaded to it.

    `size` (full, 320px, 160px) is for Imagenette alone. torchvision's test set is our val. Raises
    DataError for an unknown name or size, and for a set neither on disk nor to be downloaded.
    """
    if name not in TORCHVISION_SETS:
        raise DataError(f"torchvision set {name!r} is unknown; use {', '.join(TORCHVISION_SETS)}")
    if name == "Imagenette":
        return _imagenette(root, size)
    classes: list[str] = []
    splits: dict[str, Reader] = {}
    for split in ("train", "val"):
        loaded = _on_disk_or_downloaded(name, root, train=split == "train")
        splits[split] = ArrayReader(np.asarray(loaded.data), np.asarray(loaded.targets))
        classes = list(loaded.classes)
    return Source("torchvision", name, classes, splits)


def _imagenette(root: Path, size: str) -> Source:
    if size not in _IMAGENETTE_FOLDERS:
        raise DataError(f"Imagenette has no size {size!r}; use {', '.join(_IMAGENETTE_FOLDERS)}")
    loaded = _on_disk_or_downloaded("Imagenette", root, split="train", size=size)
    splits: dict[str, Reader] = {
        split: list_images(root / _IMAGENETTE_FOLDERS[size] / split, loaded.wnids, all_filled=True)
        for split in ("train", "val")
    }
    classes = [names[0] for names in loaded.classes]
    return Source("torchvision", "Imagenette", classes, splits, {"size": size})


def _on_disk_or_downloaded(name: str, root: Path, **options: Any) -> Any:
    build = getattr(datasets, name)
    try:
        return build(str(root), download=False, **options)
    except (RuntimeError, OSError):
        pass
    # A download fails in as many ways as there are network libraries below it.
    try:
        return build(str(root), download=True, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"{name} was not found under {root} and could not be downloaded ({reason}); put the "
            f"files there as torchvision lays them out, or name the folder that has them"
        ) from error
