"""What packing asks of a data set, and the two kinds of reader that most of them need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.images.decode import checked_extension, encode_png, said_by_pillow
from data.sources.left_out import LeftOut


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

    Where `classes` are ids, `class_names` has what people call them. `prepare` is called with
    (workers, progress) before shards are written; the folder `scratch` is removed once the packing
    is complete. `left_out` and `notes` are for the user, once it is.
    """

    kind: str
    name: str
    classes: list[str]
    splits: dict[str, Reader]
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    prepare: Callable[[int, bool], None] | None = None
    scratch: Path | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    """Image files under `root`; their bytes are packed untouched, after one test decoding.

    `stamps`, int64 [N, 2], are their sizes and times of change (ns), if they were looked at.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    stamps: np.ndarray | None = None

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

    Raises DataError where they are not a JPEG, PNG or WebP image that can be decoded to its end.
    """
    # Pillow has no one class for "this is not an image".
    try:
        return checked_extension(content)
    except Exception as error:
        raise undecodable(where, error) from error


def undecodable(where: str, reason: Exception) -> DataError:
    return DataError(
        f"{where} is not an image that can be decoded ({said_by_pillow(reason)}); "
        "repair or remove it"
    )


def hash_of_list(names: Sequence[str], labels: np.ndarray) -> str:
    """Return a hex SHA-256 over names and labels."""
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    digest.update(labels.astype(np.int64).tobytes())
    return digest.hexdigest()


def held_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions in two, alike in classes, the same way every time."""
    from sklearn.model_selection import train_test_split

    train, val = train_test_split(
        np.arange(len(labels)), test_size=fraction, random_state=0, stratify=labels
    )
    return np.asarray(train), np.asarray(val)
