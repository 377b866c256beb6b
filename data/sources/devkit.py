"""What ILSVRC2012's development kit and its replacements say: class names, labels of val."""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.errors import DataError

_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_NAME = "ILSVRC2012_val_{:08d}"


@dataclass(frozen=True)
class Devkit:
    """The development kit of task 1 and 2.

    `names` are those of the classes to be told apart, "tench, Tinca tinca", by WordNet id;
    `train_images` says how many training images each should have; `val` has the WordNet id of each
    validation image, by its name without ".JPEG".
    """

    names: dict[str, str]
    train_images: dict[str, int]
    val: dict[str, str]


def read_devkit(path: Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz, or the folder unpacked from it.

    Raises DataError where it is missing or is not that development kit.
    """
    from scipy.io import loadmat

    again = "give ILSVRC2012_devkit_t12.tar.gz as image-net.org offers it, or --val-labels FILE"
    try:
        meta, truth = _folder_files(path) if path.is_dir() else _archive_files(path)
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        # Inner nodes of the hierarchy are listed as well; images belong to leaves.
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        val = [wnids[int(line)] for line in truth.decode("ascii").split()]
    # A damaged file of MATLAB's fails in many ways.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not ImageNet's development kit ({reason}); {again}") from error
    return Devkit(
        names={str(row["WNID"]): str(row["words"]) for row in leaves},
        train_images={str(row["WNID"]): int(row["num_train_images"]) for row in leaves},
        val={_VAL_NAME.format(i + 1): wnid for i, wnid in enumerate(val)},
    )


def _folder_files(path: Path) -> tuple[bytes, bytes]:
    return (path / _META).read_bytes(), (path / _TRUTH).read_bytes()


def _archive_files(path: Path) -> tuple[bytes, bytes]:
    contents: dict[str, bytes] = {}
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            for wanted in (_META, _TRUTH):
                stream: Any = tar.extractfile(member) if member.name.endswith(wanted) else None
                if stream is not None:
                    contents[wanted] = stream.read()
    return contents[_META], contents[_TRUTH]


def read_val_labels(path: Path) -> dict[str, str]:
    """Read a mapping file: WordNet id by validation image, without its extension.

    Lines are `file-name class`, or CSV as Kaggle's LOC_val_solution.csv (`ImageId` and
    `PredictionString`, of which the first word is the class). Raises DataError where there is no
    such file, and for a line that is neither, which it names.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a text file of labels") from error
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("ImageId,")):
            continue
        words = [word for field in next(csv.reader([line])) for word in field.split()]
        if len(words) < 2 or ("," not in line and len(words) != 2):
            raise DataError(
                f"line {number} of {path} is not a file name and a class ({line[:60]!r}); "
                "write lines like: ILSVRC2012_val_00000001.JPEG n01751748"
            )
        labels[stem(words[0])] = words[1]
    if not labels:
        raise DataError(f"{path} has no labels; write lines of a file name and a class")
    return labels


def stem(name: str) -> str:
    """Return a file's name without folders and extension."""
    return PurePosixPath(name).stem
