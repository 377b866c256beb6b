"""What a set of images is, as far as a first recipe needs to know it: found in seconds."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.packing.encoding import AS_IT_IS
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, MANIFEST_NAME, load_manifest
from data.sources.image_folder import imagefolder
from data.sources.left_out import DEFAULT_SHARE
from data.sources.source import Reader
from data.storage.reader import ShardReader, WholeShards
from launcher.errors import UsageError

_LOOKED_AT = 200
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Look:
    """A set of images: `folder` holds shards if it is `packed`, else folders of classes.

    `side` is the middle of the shorter sides of the images looked at, in pixels, and `longer` of
    the longer ones. `transparent`: some are so in places.
    """

    folder: Path
    packed: bool
    train: int
    val: int
    classes: int
    side: int
    longer: int
    channels: int
    transparent: bool
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, as runs may be called."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", self.folder.resolve().name).strip("._-") or "images"


def look_at(folder: Path) -> Look:
    """Look at a folder of class folders, with or without train/ and val/, or of packed shards.

    Raises UsageError or DataError where it is neither, or could not be packed or trained on.
    """
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: give the one that holds a folder of images for each "
            "class, or the shards that `scl pack` wrote"
        )
    if (folder / "train" / MANIFEST_NAME).is_file():
        return _of_shards(folder)
    if (folder / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{folder} is one split: give the folder that holds train/ and val/, {folder.parent} "
            "perhaps"
        )
    for place in (folder / "train", folder):
        if any(place.glob("*.tar")):
            splits = _SPLITS if place != folder else (".",)
            commands = " and ".join(f"`scl pack index {folder / name}`" for name in splits)
            raise UsageError(
                f"{place} holds shards that nobody has counted: run {commands} first; "
                "training needs train/ and val/"
            )
    return _of_class_folders(folder)


def _of_shards(folder: Path) -> Look:
    if not (folder / "val" / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{folder} has no val/ to measure on: pack it with one (--val-fraction 0.1 holds a "
            "tenth out)"
        )
    train, val = (load_manifest(folder / split) for split in _SPLITS)
    index = SampleIndex.load(folder / "train" / INDEX_NAME)
    reader = ShardReader(WholeShards([folder / "train" / shard.name for shard in train.shards]))

    def read(i: int) -> bytes:
        return reader.read(int(index.shard[i]), int(index.offset[i]), int(index.size[i]))

    seen = _Seen(read, len(index))
    return Look(
        folder,
        packed=True,
        train=train.samples,
        val=val.samples,
        classes=len(train.classes),
        side=seen.side,
        longer=seen.longer,
        channels=train.image.channels,
        transparent=False,
    )


def _of_class_folders(folder: Path) -> Look:
    source = imagefolder(folder, None, leave_out=DEFAULT_SHARE)
    train = source.splits["train"]
    seen = _Seen(_bytes_of(train), len(train.labels))
    return Look(
        folder,
        packed=False,
        train=len(train.labels),
        val=len(source.splits["val"].labels),
        classes=len(source.classes),
        side=seen.side,
        longer=seen.longer,
        channels=seen.channels,
        transparent=seen.transparent,
        notes=(*source.notes, *map(str, source.left_out)),
    )


def _bytes_of(reader: Reader) -> Callable[[int], bytes]:
    return lambda i: reader.read(i)[0]


class _Seen:
    """Some of the images, evenly spread over all."""

    def __init__(self, read: Callable[[int], bytes], count: int) -> None:
        sizes: list[tuple[int, int]] = []
        self.channels, self.transparent = 1, False
        for content in _some(read, count):
            with Image.open(io.BytesIO(content)) as image:
                sizes.append((min(image.size), max(image.size)))
                # As `data.images.decode` has it.
                grey = image.mode in {"1", "L"} or image.mode.startswith("I")
            self.channels = self.channels if grey else 3
            self.transparent |= AS_IT_IS.refuses(content)
        self.side, self.longer = (int(statistics.median(both)) for both in zip(*sizes, strict=True))


def _some(read: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    for i in np.linspace(0, count - 1, min(count, _LOOKED_AT)).round().astype(int).tolist():
        yield read(i)
