"""The samples that a run is evaluated on: a split of shards, or a folder of class folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augmentation.transforms import eval_transform
from data.errors import DataError
from data.images.decode import CorruptImage
from data.packing.encoding import KEEP, Encoding
from data.shards.manifest import MANIFEST_NAME, ImageStats
from data.shards.scan import IMAGE_EXTENSIONS
from data.sources.left_out import Collector
from data.sources.listing import class_folders, list_images, readable
from data.stream.pipeline import DataConfig, eval_stream, open_split
from launcher.errors import UsageError
from launcher.folder.provenance import background_of
from launcher.recipe.recipe import Recipe

ORIGIN_NAME = "origin.json"
_log = logging.getLogger("data")
# What is decoded from a file on disk, though packing takes it only converted.
READABLE = IMAGE_EXTENSIONS | {"bmp", "gif", "pgm", "ppm", "tif", "tiff"}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Known:
    """What a run was trained on: its classes, in order of label, and its images' statistics."""

    classes: list[str]
    names: list[str]
    image: ImageStats
    background: str = KEEP
    """What transparent images were put before when they were packed."""


@dataclass(frozen=True)
class Samples:
    """Batches of image (uint8 [B, C, H, W]), label, id, corrupt and valid, over `count` samples."""

    source: str
    count: int
    batches: Iterator[Batch]


def known_of(run: Path, recipe: Recipe) -> Known:
    """What `run` noted at its start; of a run from before that was noted, what its shards say."""
    if (run / ORIGIN_NAME).is_file():
        return read_known(run)
    manifest = open_split(recipe.data, "train").manifest
    return Known(manifest.classes, manifest.names, manifest.image, background_of(manifest) or KEEP)


def read_known(run: Path) -> Known:
    """What `run` noted at its start, which is there."""
    data = json.loads((run / ORIGIN_NAME).read_text(encoding="utf-8"))["data"]
    image = ImageStats.model_validate(data["image"])
    background = data.get("background") or KEEP
    return Known(data["classes"], data["class_names"], image, background)


def open_samples(config: DataConfig, known: Known, split: str) -> Samples:
    """Split `split` of config.path, or its class folders if these are no shards.

    A sample that cannot be decoded is marked as corrupt. Raises UsageError or DataError where there
    is nothing, or where classes are not those of the run.
    """
    root = Path(str(config.path)) / split
    if _is_elsewhere(config.path) or (root / MANIFEST_NAME).is_file():
        return _of_shards(config, known, split)
    folder = root if root.is_dir() else Path(str(config.path))
    if folder != root and (splits := _splits_of(folder)):
        raise UsageError(
            f"{folder} has no split {split!r}: it has {' and '.join(splits)}; choose one with "
            "--split"
        )
    if not folder.is_dir():
        raise UsageError(
            f"there is no {root}, nor a folder {config.path} of class folders: name the folder "
            f"that `scl pack` wrote, or one that holds a folder of images for each class"
        )
    return _of_folder(folder, config, known)


def _splits_of(folder: Path) -> list[str]:
    """The splits that are packed in `folder`."""
    return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))


def _is_elsewhere(path: str | Path) -> bool:
    return "://" in str(path) or str(path).startswith("pipe:")


def _of_shards(config: DataConfig, known: Known, split: str) -> Samples:
    dataset = open_split(config, split)
    if dataset.manifest.classes != known.classes:
        raise UsageError(
            f"{config.path}/{split} has other classes ({len(dataset.manifest.classes)}) than the "
            f"run was trained on ({len(known.classes)}), or in another order"
        )
    return Samples(f"{config.path}/{split}", len(dataset), eval_stream(dataset, config))


def _of_folder(folder: Path, config: DataConfig, known: Known) -> Samples:
    dataset = _FolderDataset(folder, config, known)
    loader = DataLoader(dataset, config.eval_batch_size, num_workers=config.workers)
    return Samples(str(folder), len(dataset), iter(loader))


class _FolderDataset(Dataset[dict[str, Any]]):
    """`folder/CLASS/image` with the images as evaluation sees those of shards."""

    def __init__(self, folder: Path, config: DataConfig, known: Known) -> None:
        try:
            classes = class_folders(folder)
        except DataError as error:
            raise UsageError(f"{folder} is no folder of class folders: {error}") from error
        labels = {name: label for label, name in enumerate(known.names)}
        labels |= {name: label for label, name in enumerate(known.classes)}
        foreign = [name for name in map(readable, classes) if name not in labels]
        if foreign:
            raise UsageError(
                f"{folder}/{foreign[0]} is none of the run's {len(labels)} classes (such as "
                f"{known.classes[0]}): name class folders as the training data does"
            )
        left_out = Collector()
        self._images = list_images(
            folder, classes, all_filled=True, left_out=left_out, extensions=READABLE
        )
        for kind in left_out.listed():
            _log.warning("%s in %s", kind, folder)
        self._labels = [labels[readable(name)] for name in classes]
        self._transform = eval_transform(config, known.image)
        self._encoding = Encoding(background=known.background)
        self._shape = (config.image_size, config.image_size, known.image.channels)

    def __len__(self) -> int:
        return len(self._images.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._images.root / self._images.names[index]
        folder = int(self._images.labels[index])
        image = torch.zeros(self._shape, dtype=torch.uint8)
        corrupt = 0
        try:
            self._transform(self._seen(path.read_bytes()), 0, image)
        except CorruptImage:
            corrupt = 1
        return {
            "image": image.permute(2, 0, 1),
            "label": self._labels[folder],
            "id": index,
            "corrupt": corrupt,
            "valid": True,
        }

    def _seen(self, content: bytes) -> bytes:
        """The image before the colour that the training data was packed before."""
        if self._encoding.background == KEEP:
            return content
        try:
            return self._encoding.image(content, "")[0]
        # Pillow has no one class for what is no image; decoding it will say so.
        except Exception:
            return content
