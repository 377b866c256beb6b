"""Where each sample's image lies inside the tars: found by reading headers, kept beside them."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import atomic_file
from data.shards.tars import check_end

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_EXTENSION = "cls"
_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32}
# The convention of webdataset: the key ends at the first dot of the base name.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_TAR_BLOCK = 512


@dataclass(frozen=True)
class ShardRows:
    """The samples of one tar, in order: where the image bytes lie, and the label."""

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class SampleIndex:
    """One row per sample in packed order; a sample's id is its row.

    `shard`, int32 [N], is the position of the tar in the manifest's list; `offset`, int64 [N], the
    first byte of the image inside the tar; `size`, int32 [N], the image's length in bytes; `label`
    is int32 [N].
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def from_rows(cls, shards: Sequence[ShardRows]) -> SampleIndex:
        """Join the rows of all shards, given in the manifest's order."""
        lengths = [len(rows.label) for rows in shards]
        return cls(
            shard=np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
            offset=np.concatenate([rows.offset for rows in shards]),
            size=np.concatenate([rows.size for rows in shards]),
            label=np.concatenate([rows.label for rows in shards]),
        )

    def save(self, path: Path) -> None:
        """Write the index atomically; equal indices give equal bytes."""
        with atomic_file(path) as stream:
            np.savez(stream, shard=self.shard, offset=self.offset, size=self.size, label=self.label)

    @classmethod
    def load(cls, path: Path) -> SampleIndex:
        """Read an index.

        Raises DataError where the file is missing or is no index.
        """
        fix = f"rebuild it with `scl pack index {path.parent}`"
        try:
            with np.load(path, allow_pickle=False) as stored:
                columns = {name: stored[name].astype(kind) for name, kind in _COLUMNS.items()}
        except FileNotFoundError as error:
            raise DataError(f"there is no {path}; {fix}") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a readable index ({error}); {fix}") from error
        if len({len(column) for column in columns.values()}) != 1:
            raise DataError(f"the columns of {path} differ in length; {fix}")
        return cls(**columns)


def scan_shard(path: Path, label_field: str | None = None) -> ShardRows:
    """Find the samples of a tar; only headers and the small label members are read.

    Members are grouped by key while the key stays the same. Each sample needs one image (jpg, jpeg,
    png, webp) and one `.cls` with an integer, or, with `label_field`, a `.json` with an
    integer in that field; all else is ignored. Raises DataError, naming the shard and the key,
    where it is not a whole tar, holds no samples, or has a sample without exactly one image and one
    valid label.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    labels: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            group = _Group(path, label_field)
            for member in tar:
                named = _MEMBER.match(member.name) if member.isfile() else None
                if named is None:
                    continue
                if named[1] != group.key:
                    group.close_into(offsets, sizes, labels)
                    group = _Group(path, label_field, named[1])
                group.add(tar, member, named[2].lower())
            group.close_into(offsets, sizes, labels)
            check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole, uncompressed tar file ({error}); copy or pack it again"
        ) from error
    if not labels:
        raise DataError(
            f"{path} holds no samples (an image and a .cls under one key); remove it or pack again"
        )
    return ShardRows(
        np.array(offsets, np.int64), np.array(sizes, np.int32), np.array(labels, np.int32)
    )


class _Group:
    """The members seen so far under one key."""

    def __init__(self, path: Path, label_field: str | None, key: str = "") -> None:
        self.path = path
        self.key = key
        self.label_field = label_field
        self.label_extension = LABEL_EXTENSION if label_field is None else "json"
        self.image: tarfile.TarInfo | None = None
        self.label: int | None = None

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        if extension in IMAGE_EXTENSIONS:
            if self.image is not None:
                raise self._error("has more than one image", "keep one image under each key")
            self.image = member
        elif extension == self.label_extension:
            if self.label is not None:
                raise self._error(
                    f"has more than one .{extension}", "keep one label under each key"
                )
            self.label = self._read_label(tar, member)

    def _read_label(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
        stream = tar.extractfile(member)
        text = stream.read() if stream is not None else b""
        if self.label_field is not None:
            return self._label_in_json(text, self.label_field)
        try:
            label = int(text.decode("ascii"))
        except ValueError:
            label = -1
        if not 0 <= label < 2**31:
            shown = repr(text[:20])[1:]
            raise self._error(
                f"has the label {shown}", "a .cls must hold one integer, 0 or more, in ASCII"
            )
        return label

    def _label_in_json(self, text: bytes, name: str) -> int:
        try:
            stored = json.loads(text)
        except ValueError:
            stored = None
        label = stored.get(name) if isinstance(stored, dict) else None
        # In Python, true is an integer.
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            raise self._error(
                f"has {label!r} in the field {name!r} of its .json",
                "name a field that holds one integer, 0 or more",
            )
        return label

    def close_into(self, offsets: list[int], sizes: list[int], labels: list[int]) -> None:
        if self.image is None and self.label is None:
            return
        if self.image is None:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise self._error("has a label but no image", f"add one as {kinds}")
        if self.label is None:
            missing = f"{self.key}.{self.label_extension}"
            raise self._error(
                "has an image but no label",
                f"add {missing} with an integer, or use --label-from json:FIELD if key.json has it",
            )
        offsets.append(self.image.offset_data)
        sizes.append(self.image.size)
        labels.append(self.label)

    def _error(self, wrong: str, fix: str) -> DataError:
        return DataError(f"sample {self.key!r} in {self.path} {wrong}; {fix}")


def key_at(path: Path, offset: int) -> str:
    """Return the key of the sample whose image starts at `offset`, from the tar header.

    Raises DataError where no tar header stands before `offset`.
    """
    with path.open("rb") as stream:
        stream.seek(offset - _TAR_BLOCK)
        block = stream.read(_TAR_BLOCK)
    try:
        name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
    except tarfile.HeaderError as error:
        raise DataError(
            f"{path} has no tar header before byte {offset} ({error}); "
            "the index is not that of this shard: index or pack the folder again"
        ) from error
    named = _MEMBER.match(name)
    return named[1] if named else name
