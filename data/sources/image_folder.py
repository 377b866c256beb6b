"""Folders of images, one per class, as torchvision's ImageFolder reads them, with their splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.errors import DataError
from data.sources.left_out import DEFAULT_SHARE, Collector, check_share, some
from data.sources.listing import check_not_empty, class_folders, folders_in, list_images, readable
from data.sources.source import FileReader, Reader, Source, held_out

_USUAL_FRACTION = 0.1
_NAMES_OF_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def imagefolder(
    folder: Path, val_fraction: float | None = 0.0, *, leave_out: float = DEFAULT_SHARE
) -> Source:
    """Return `folder/train/<class>/…` and `folder/val/<class>/…`, or `folder/<class>/…`.

    Folders may as well be called training, valid, validation, test and testing, in capitals or
    not. A test folder is taken for val where there is no other, and is a split of its own where
    there is. `val_fraction` (0 to 1) holds out a fixed part of each class where there is no val
    folder; None holds out a tenth where there is no test folder either. Raises DataError where the
    folder or its images are missing, val has a class that train has not, `val_fraction` cannot be
    applied, or more than the share `leave_out` of the images cannot be taken.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give the one that holds train/ and val/")
    left_out, notes = Collector(), []
    folders = _split_folders(folder, left_out)
    root = folders.pop("train", folder)
    classes = class_folders(root)
    train = list_images(root, classes, all_filled=True, left_out=left_out)
    splits: dict[str, Reader] = {"train": train}
    if "val" in folders and val_fraction:
        raise DataError(
            f"{folder} has a val folder already ({folders['val'].name}/); leave out --val-fraction"
        )
    if "val" not in folders and "test" in folders and not val_fraction:
        folders["val"] = folders.pop("test")
        notes.append(f"val is {folders['val']}, since there is no other")
    options = {} if not val_fraction else {"val_fraction": val_fraction}
    if "val" not in folders:
        if val_fraction is None:
            val_fraction = max(_USUAL_FRACTION, len(classes) / len(train.names))
            options = {"val_fraction": val_fraction}
            notes.append(
                f"val is {val_fraction:.3g} of each class, held out of {root}, since {folder} has "
                "no val/ (--val-fraction 0 packs all for training)"
            )
        if val_fraction:
            splits["train"], splits["val"] = _split_files(train, val_fraction, classes)
        else:
            notes.append(f"no val split: {folder} has no val/; training needs one")
    for split, path in sorted(folders.items(), reverse=True):
        splits[split] = _of_known_classes(path, classes, root, left_out)
    for reader in (train, *splits.values()):
        if isinstance(reader, FileReader):
            check_not_empty(reader)
    taken = sum(len(reader.labels) for reader in splits.values())
    check_share(str(folder), taken, left_out.listed(), leave_out)
    name = folder.resolve().name
    return Source(
        "imagefolder",
        name,
        [*map(readable, classes)],
        splits,
        options,
        left_out=left_out.listed(),
        notes=notes,
    )


def _split_folders(folder: Path, left_out: Collector) -> dict[str, Path]:
    """The folders of the splits; none where `folder` holds the class folders itself.

    A class may be called train or test: it is a split only if it holds folders in turn, or stands
    beside nothing else.
    """
    names = folders_in(folder)
    is_alone = all(name.lower() in _NAMES_OF_SPLITS for name in names)
    splits: dict[str, Path] = {}
    others: list[str] = []
    for name in names:
        split = _NAMES_OF_SPLITS.get(name.lower())
        if split is None or not (is_alone or folders_in(folder / name)):
            others.append(name)
        elif split in splits:
            raise DataError(
                f"{folder} has {splits[split].name}/ and {name}/, which both mean {split}; "
                "rename or move one of them"
            )
        else:
            splits[split] = folder / name
    if not splits:
        _check_not_above(folder, names)
        return {}
    if "train" not in splits:
        raise DataError(
            f"{folder} has {some([path.name for path in splits.values()])} but no train/; name the "
            "folder that holds train/, or the one of the class folders to split with --val-fraction"
        )
    for split in [name for name, path in splits.items() if name != "train"]:
        if not folders_in(splits[split]):
            left_out.add("folders without class folders", f"{splits.pop(split).name}/")
    for name in others:
        left_out.add("folders beside train/", f"{name}/")
    return splits


def _check_not_above(folder: Path, names: list[str]) -> None:
    """An archive often unpacks into one folder more than one thinks."""
    for name in names:
        inner = {_NAMES_OF_SPLITS.get(inner.lower()): inner for inner in folders_in(folder / name)}
        if "train" in inner and folders_in(folder / name / inner["train"]):
            raise DataError(
                f"{folder} holds no class folders: {name}/ holds {inner['train']}/; "
                f"name {folder / name} instead"
            )


def _of_known_classes(
    path: Path, classes: list[str], train: Path, left_out: Collector
) -> FileReader:
    unknown = sorted(set(class_folders(path)) - set(classes))
    if unknown:
        raise DataError(
            f"{path} has classes that {train} has not ({', '.join(unknown[:5])}); "
            "give both the same class folders"
        )
    return list_images(path, classes, all_filled=False, left_out=left_out)


def _split_files(
    reader: FileReader, val_fraction: float, classes: list[str]
) -> tuple[FileReader, FileReader]:
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction is {val_fraction:g}; it must lie between 0 and 1")
    counts = np.bincount(reader.labels, minlength=len(classes))
    single = [classes[k] for k in np.flatnonzero(counts < 2)]
    whole = f"--val-fraction {val_fraction:.3g} cannot be held out of {reader.root}"
    if single:
        raise DataError(
            f"{whole}: {some(single)} {'has' if len(single) == 1 else 'have'} one image only, and "
            "each class needs one for training and one for val; add images, remove the class, or "
            "use --val-fraction 0 and a val/ folder of your own"
        )
    samples = len(reader.labels)
    if min(np.ceil(samples * val_fraction), np.floor(samples * (1 - val_fraction))) < len(classes):
        least = np.ceil(100 * len(classes) / samples) / 100
        raise DataError(
            f"{whole}: of {samples:,} images one part would have fewer than the {len(classes)} "
            f"classes; use --val-fraction {least:g} or more, and at most {1 - least:g}"
        )
    train, val = (
        FileReader(
            reader.root,
            [reader.names[i] for i in part],
            reader.labels[part],
            None if reader.stamps is None else reader.stamps[part],
        )
        for part in held_out(reader.labels, val_fraction)
    )
    return train, val
