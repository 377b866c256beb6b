"""What can be packed: scikit-learn's digits, image folders and torchvision's sets."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.images import checked_extension, encode_png
from data.index import IMAGE_EXTENSIONS


class Reader(Protocol):
    """The samples of one split before packing; picklable, so that processes can share it."""

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64 [N]."""
        ...

    def read(self, i: int) -> tuple[bytes, str, int]:
        """Return the encoded image, its extension and its label."""
        ...

    def where(self, i: int) -> str:
        """Return where a sample comes from, for messages."""
        ...

    def content_hash(self) -> str:
        """Return a hash that changes when the list of samples does."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set to pack: one reader per split, and what identifies it.

    Attributes:
        class_names: for people, one per class, where ``classes`` are ids.
        prepare: called with (workers, progress) before shards are written.
        scratch: a folder to be removed once the packing is complete.
    """

    kind: str
    name: str
    classes: list[str]
    splits: dict[str, Reader]
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    prepare: Callable[[int, bool], None] | None = None
    scratch: Path | None = None

    def samples(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {split: len(reader.labels) for split, reader in self.splits.items()}

    def fingerprint(self) -> str:
        """Return a hex SHA-256 over the classes and the list of samples of each split."""
        parts = {split: reader.content_hash() for split, reader in self.splits.items()}
        return hashlib.sha256(json.dumps([self.classes, parts]).encode()).hexdigest()


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory, uint8 [N, H, W] or [N, H, W, 3]; packed as PNG, without loss."""

    images: np.ndarray
    labels: np.ndarray

    def read(self, i: int) -> tuple[bytes, str, int]:
        return encode_png(self.images[i]), "png", int(self.labels[i])

    def where(self, i: int) -> str:
        return f"image {i}"

    def content_hash(self) -> str:
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class FileReader:
    """Image files under ``root``; their bytes are packed untouched, after one test decoding."""

    root: Path
    names: list[str]
    labels: np.ndarray

    def read(self, i: int) -> tuple[bytes, str, int]:
        path = self.root / self.names[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise undecodable(str(path), error) from error
        return content, extension_of(content, str(path)), int(self.labels[i])

    def where(self, i: int) -> str:
        return str(self.root / self.names[i])

    def content_hash(self) -> str:
        return hash_of_list(self.names, self.labels)


def extension_of(content: bytes, where: str) -> str:
    """Return the extension that the bytes deserve, whatever the file is called.

    Raises:
        DataError: they are not a JPEG, PNG or WebP image that can be decoded to its end.
    """
    # Pillow has no one class for "this is not an image".
    try:
        return checked_extension(content)
    except Exception as error:
        raise undecodable(where, error) from error


def undecodable(where: str, reason: Exception) -> DataError:
    return DataError(f"{where} is not an image that can be decoded ({reason}); repair or remove it")


def hash_of_list(names: Sequence[str], labels: np.ndarray) -> str:
    """Return a hex SHA-256 over names and labels."""
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    digest.update(labels.astype(np.int64).tobytes())
    return digest.hexdigest()


def digits() -> Source:
    """Return scikit-learn's 1,797 8×8 grey digits; always the same 1,437 for training, 360 for val.

    The values 0-16 are scaled to 0-255.
    """
    from sklearn.datasets import load_digits

    stored: Any = load_digits()
    labels = stored.target
    pixels = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    train, val = _held_out(labels, 0.2)
    splits: dict[str, Reader] = {
        "train": ArrayReader(pixels[train], labels[train]),
        "val": ArrayReader(pixels[val], labels[val]),
    }
    return Source("digits", "digits", [str(digit) for digit in range(10)], splits)


def imagefolder(folder: Path, val_fraction: float | None = None) -> Source:
    """Return ``folder/train/<class>/…`` and ``folder/val/<class>/…``, or ``folder/<class>/…``.

    ``val_fraction`` (0 to 1) holds out a fixed part of each class where there is no val folder.

    Raises:
        DataError: the folder or its images are missing, val has a class that train has not,
            or ``val_fraction`` cannot be applied.
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
        found = sorted(_images_below(root, class_name))
        if all_filled and not found:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise DataError(
                f"the class folder {root / class_name} holds no images ({kinds}); "
                "fill it or remove it"
            )
        names += found
        labels += [label] * len(found)
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
        parts = _held_out(reader.labels, val_fraction)
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


def _held_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions in two, alike in classes, the same way every time."""
    from sklearn.model_selection import train_test_split

    train, val = train_test_split(
        np.arange(len(labels)), test_size=fraction, random_state=0, stratify=labels
    )
    return np.asarray(train), np.asarray(val)


_ARRAY_SETS = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")
_IMAGENETTE_FOLDERS = {
    "full": "imagenette2",
    "320px": "imagenette2-320",
    "160px": "imagenette2-160",
}
TORCHVISION_SETS = (*_ARRAY_SETS, "Imagenette")


def torchvision_set(name: str, root: Path, size: str = "full") -> Source:
    """Return a set of torchvision, from ``root`` or, where it is not there, downloaded to it.

    ``size`` (full, 320px, 160px) is for Imagenette alone. torchvision's test set is our val.

    Raises:
        DataError: an unknown name or size, or a set neither on disk nor to be downloaded.
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
    from torchvision import datasets

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
