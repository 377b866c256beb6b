"""The samples of a tar, found by reading its headers and its small label files alone."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.shards.tars import check_end

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp"})
# Images too, but not read here.
OTHER_IMAGE_EXTENSIONS = frozenset(
    "avif bmp dng gif heic heif ico jp2 jxl pbm pgm ppm psd svg tga tif tiff".split()  # noqa: SIM905
)
LABEL_EXTENSION = "cls"
# The convention of webdataset: the key ends at the first dot of the base name.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")


@dataclass(frozen=True)
class ShardRows:
    """The samples of one tar, in order: where the image bytes lie, and the label.

    `left_out` has a reason and a name for each image that belongs to no sample.
    """

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    left_out: list[tuple[str, str]] = field(default_factory=list)


def scan_shard(path: Path, label_field: str | None = None) -> ShardRows:
    """Find the samples of a tar; only headers and the small label members are read.

    Members are grouped by key while the key stays the same. Each sample needs one image (jpg, png,
    webp …) and one `.cls` with an integer, or, with `label_field`, a `.json` with an integer in
    that field. A key ends at the first dot, but where an image and its label agree to the last dot,
    they are a sample as well. Links are followed inside the tar. Raises DataError, naming the shard
    and the key, where it is not a whole tar, holds no samples, holds a key twice, or has a sample
    without exactly one image and one valid label.
    """
    scan = _Scan(path, label_field)
    try:
        with tarfile.open(path, "r:") as tar:
            scan.read(tar)
            check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole, uncompressed tar file ({error}); copy or pack it again"
        ) from error
    if not scan.rows:
        missing = f"; {len(scan.left_out)} images have no label" if scan.left_out else ""
        raise DataError(
            f"{path} holds no samples (an image and a .cls under one key){missing}; remove it or "
            "pack again"
        )
    offsets, sizes, labels = zip(*scan.rows, strict=True)
    return ShardRows(
        np.array(offsets, np.int64),
        np.array(sizes, np.int32),
        np.array(labels, np.int32),
        scan.left_out,
    )


@dataclass(frozen=True)
class _Member:
    """A file of the tar, or what a link in it leads to."""

    name: str
    extension: str
    offset: int
    size: int


class _Scan:
    """One pass over a tar."""

    def __init__(self, path: Path, label_field: str | None) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.left_out: list[tuple[str, str]] = []
        self._path = path
        self._field = label_field
        self._label_extension = LABEL_EXTENSION if label_field is None else "json"
        self._keys: set[str] = set()
        self._stream: Any = None

    def read(self, tar: tarfile.TarFile) -> None:
        self._stream = tar.fileobj
        group: list[_Member] = []
        key = None
        for name, offset, size in self._files(tar):
            named = _MEMBER.match(name)
            if named is None:
                continue
            if named[1] != key:
                self._close(key, group)
                key, group = named[1], []
            group.append(_Member(name, named[2].lower(), offset, size))
        self._close(key, group)

    def _files(self, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
        """Name, first byte and length of each file; of a link, those of the file it leads to."""
        places: dict[str, tuple[int, int]] = {}
        for member in tar:
            place = None
            if member.issparse():
                self._leave_out("stored with holes (sparse)", member.name)
            elif member.isfile():
                place = member.offset_data, member.size
            elif member.islnk():
                place = places.get(posixpath.normpath(member.linkname))
            elif member.issym():
                folder = posixpath.dirname(member.name)
                place = places.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
            if place is not None:
                places[posixpath.normpath(member.name)] = place
                yield member.name, *place
            elif member.islnk() or member.issym():
                self._leave_out("links to what is not in the tar before them", member.name)

    def _leave_out(self, why: str, name: str) -> None:
        extension = name.rpartition(".")[2].lower()
        if extension in IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS | {self._label_extension}:
            self.left_out.append((why, name))

    def _close(self, key: str | None, group: list[_Member]) -> None:
        """Make samples of the members under one key."""
        if key is None:
            return
        by_key: dict[str, list[_Member]] = {}
        for member in group:
            if "." not in member.extension:
                by_key.setdefault(key, []).append(member)
        is_plain = self._add(key, by_key.get(key, []))
        for member in group:
            if "." in member.extension:
                by_key.setdefault(member.name.rpartition(".")[0], []).append(member)
        for longer, members in by_key.items():
            if longer != key:
                self._add_longer(longer, members, is_plain)

    def _add_longer(self, key: str, members: list[_Member], is_extra: bool) -> None:
        """A key that goes beyond the first dot: `scan_v1.003`, or the mask in `007.mask.png`."""
        extensions = {member.extension.rpartition(".")[2] for member in members}
        if self._label_extension in extensions and extensions & IMAGE_EXTENSIONS:
            self._add(key, members)
        elif not is_extra:
            for member in members:
                self._leave_out("without an image and a label under one key", member.name)

    def _add(self, key: str, members: list[_Member]) -> bool:
        """Add the sample of one key; whether there is one."""
        by_kind: dict[str, list[_Member]] = {"image": [], "label": [], "other": []}
        for member in members:
            extension = member.extension.rpartition(".")[2]
            kind = "label" if extension == self._label_extension else "other"
            by_kind["image" if extension in IMAGE_EXTENSIONS else kind].append(member)
        images, labels = by_kind["image"], by_kind["label"]
        if not images and not labels:
            for member in by_kind["other"]:
                if member.extension in OTHER_IMAGE_EXTENSIONS:
                    self._leave_out("in formats that are not read", member.name)
            return False
        if len(images) > 1:
            raise self._error(key, "has more than one image", "keep one image under each key")
        if len(labels) > 1:
            what = f"has more than one .{self._label_extension}"
            raise self._error(key, what, "keep one label under each key")
        if not images:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise self._error(key, "has a label but no image", f"add one as {kinds}")
        if not labels:
            fix = "use --label-from json:FIELD if key.json has it"
            missing = f"add {key}.{self._label_extension} with an integer"
            raise self._error(key, "has an image but no label", f"{missing}, or {fix}")
        if key in self._keys:
            fix = "write the shard anew with each key once (tar -r keeps what it replaces)"
            raise self._error(key, "is there twice", fix)
        self._keys.add(key)
        self.rows.append((images[0].offset, images[0].size, self._label(key, labels[0])))
        return True

    def _label(self, key: str, member: _Member) -> int:
        self._stream.seek(member.offset)
        text = self._stream.read(member.size)
        if self._field is not None:
            return self._label_in_json(key, text, self._field)
        try:
            label = int(text.decode("ascii"))
        except ValueError:
            label = -1
        if not 0 <= label < 2**31:
            shown = repr(text[:20])[1:]
            fix = "a .cls must hold one integer, 0 or more, in ASCII"
            raise self._error(key, f"has the label {shown}", fix)
        return label

    def _label_in_json(self, key: str, text: bytes, name: str) -> int:
        try:
            stored = json.loads(text)
        except ValueError:
            stored = None
        label = stored.get(name) if isinstance(stored, dict) else None
        # In Python, true is an integer.
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            what = f"has {label!r} in the field {name!r} of its .json"
            raise self._error(key, what, "name a field that holds one integer, 0 or more")
        return label

    def _error(self, key: str, wrong: str, fix: str) -> DataError:
        return DataError(f"sample {key!r} in {self._path} {wrong}; {fix}")
