"""ImageNet (ILSVRC2012) as it is downloaded: tars of tars, a devkit; or what became of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.shards.tars import Members, members_of
from data.sources.devkit import Devkit, read_devkit, read_val_labels, stem
from data.sources.listing import class_folders, list_images
from data.sources.source import FileReader, Reader, Source
from data.sources.tar_reader import TarReader

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = "LOC_val_solution.csv"
TORCHVISION_META = "meta.bin"
_log = logging.getLogger("data")


@dataclass(frozen=True)
class Files:
    """Where the parts of ImageNet are; each of train and val is a tar or a folder."""

    train: Path
    val: Path
    devkit: Path | None
    val_labels: Path | None
    torchvision_meta: Path | None


def find_files(
    folder: Path | None,
    *,
    train_tar: Path | None = None,
    val_tar: Path | None = None,
    devkit: Path | None = None,
    val_labels: Path | None = None,
) -> Files:
    """Find the parts by their usual names in `folder`; what is named is taken from there.

    Raises DataError where training or validation images are neither named nor found.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name the one that holds {TRAIN_TAR}")
    return Files(
        train=train_tar or _found_images(folder, TRAIN_TAR, "train", "--train-tar"),
        val=val_tar or _found_images(folder, VAL_TAR, "val", "--val-tar"),
        devkit=devkit or _first_of(folder, DEVKIT, DEVKIT.removesuffix(".tar.gz")),
        val_labels=val_labels or _first_of(folder, VAL_LABELS),
        torchvision_meta=_first_of(folder, TORCHVISION_META),
    )


def _found_images(folder: Path | None, tar: str, images: str, option: str) -> Path:
    place = _first_of(folder, tar, images)
    if place is None:
        if folder is None:
            raise DataError(f"where is {tar}? name the folder that holds it, or itself, {option}")
        raise DataError(
            f"found neither {tar} nor {images}/ in {folder}; name the tar with {option}"
        )
    return place


def _first_of(folder: Path | None, *names: str) -> Path | None:
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).exists()), None)


def imagenet(files: Files, scans: Path, *, progress: bool = True) -> Source:
    """Return ImageNet from its tars, or from folders of extracted images, class by class.

    Classes are the sorted WordNet ids. Samples come in the order of class and file name, so that
    tars and the folders extracted from them are packed alike. What reading the headers of a tar has
    found is kept in the folder `scans`. Raises DataError where a file is missing, damaged or not
    what it should be, or a validation image has no label.
    """
    devkit = read_devkit(files.devkit) if files.devkit is not None else None
    classes, train = _train(files.train, scans / "train.members.npz", progress)
    if devkit is not None:
        _compare(files.train, classes, train.labels, devkit)
    labels = read_val_labels(files.val_labels) if files.val_labels is not None else None
    if labels is None and devkit is not None:
        labels = devkit.val
    val = _val(files.val, scans / "val.members.npz", classes, labels, progress)
    names = devkit.names if devkit is not None else _torchvision_names(files.torchvision_meta)
    class_names = [names.get(wnid, wnid) for wnid in classes] if names else None
    splits: dict[str, Reader] = {"train": train, "val": val}
    return Source("imagenet", "imagenet", classes, splits, class_names=class_names)


def _train(path: Path, kept: Path, progress: bool) -> tuple[list[str], Reader]:
    if path.is_dir():
        classes = class_folders(path)
        return classes, list_images(path, classes, all_filled=True)
    members = members_of(path, kept, nested=True, progress=progress)
    wnids = [name.partition("/")[0] for name in members.names]
    classes = sorted(set(wnids))
    return classes, _tar_reader(path, members, wnids, members.names, classes)


def _val(
    path: Path,
    kept: Path,
    classes: Sequence[str],
    labels: Mapping[str, str] | None,
    progress: bool,
) -> Reader:
    if path.is_dir() and any(entry.is_dir() for entry in os.scandir(path)):
        unknown = sorted(set(class_folders(path)) - set(classes))
        if unknown:
            raise DataError(f"{path} has classes that train has not ({', '.join(unknown[:5])})")
        return list_images(path, classes, all_filled=False)
    if labels is None:
        raise DataError(
            f"{path} says nothing of the classes of its images; put {DEVKIT} beside it, or name "
            "one with --devkit or a file of labels with --val-labels"
        )
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        wnids = _labelled(path, names, labels, classes)
        return FileReader(path, *_ordered(names, wnids, classes)[:2])
    members = members_of(path, kept, nested=False, progress=progress)
    wnids = _labelled(path, members.names, labels, classes)
    names = [
        f"{wnid}/{name.rpartition('/')[2]}" for wnid, name in zip(wnids, members.names, strict=True)
    ]
    return _tar_reader(path, members, wnids, names, classes)


def _labelled(
    path: Path, names: Sequence[str], labels: Mapping[str, str], classes: Sequence[str]
) -> list[str]:
    unlabelled = [name for name in names if stem(name) not in labels]
    if unlabelled:
        raise DataError(
            f"{unlabelled[0]} in {path} has no label (of {len(names):,} images "
            f"{len(unlabelled):,} have none); are these the validation images, and their labels?"
        )
    wnids = [labels[stem(name)] for name in names]
    unknown = sorted(set(wnids) - set(classes))
    if unknown:
        raise DataError(
            f"the labels of {path} name classes that train has not ({', '.join(unknown[:5])}); "
            "use labels and training images of the same classes"
        )
    return wnids


def _ordered(
    names: Sequence[str], wnids: Sequence[str], classes: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names and labels by class, then name, and the positions they had."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.array([label_of[wnid] for wnid in wnids], np.int64)
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    return [names[i] for i in order], labels[order], np.array(order, np.int64)


def _tar_reader(
    path: Path,
    members: Members,
    wnids: Sequence[str],
    names: Sequence[str],
    classes: Sequence[str],
) -> TarReader:
    ordered, labels, order = _ordered(names, wnids, classes)
    stored = np.array([os.fsencode(name) for name in ordered], "S")
    return TarReader(path, stored, members.offset[order], members.size[order], labels)


def _compare(path: Path, classes: Sequence[str], labels: np.ndarray, devkit: Devkit) -> None:
    """Compare the training images with what the devkit says there should be."""
    missing, foreign = set(devkit.names) - set(classes), set(classes) - set(devkit.names)
    if missing or foreign:
        what = f"lacks {len(missing)} of the {len(devkit.names)} classes of the devkit"
        if foreign:
            what = f"has classes that the devkit has not ({', '.join(sorted(foreign)[:5])})"
        raise DataError(
            f"{path} {what}; get both from the same year of ImageNet, or leave the devkit out "
            "and give --val-labels"
        )
    counts = np.bincount(labels, minlength=len(classes))
    wrong = [k for k, wnid in enumerate(classes) if counts[k] != devkit.train_images[wnid]]
    if wrong:
        wnid = classes[wrong[0]]
        _log.warning(
            "%d classes of %s do not have as many images as the devkit says (%s: %d, not %d)",
            *(len(wrong), path, wnid, counts[wrong[0]], devkit.train_images[wnid]),
        )


def _torchvision_names(path: Path | None) -> dict[str, str]:
    """Read the class names torchvision has kept from the devkit; {} if there are none."""
    if path is None:
        return {}
    import torch

    try:
        stored: Any = torch.load(path, weights_only=True)
        return {wnid: ", ".join(names) for wnid, names in stored[0].items()}
    # Names are a comfort; a file of the same name may be anything.
    except Exception as error:
        _log.warning("%s gives no class names (%s)", path, error)
        return {}
