"""A folder of images where a recipe wants shards: refused, with the command that makes them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from data.shards.manifest import MANIFEST_NAME
from data.shards.scan import IMAGE_EXTENSIONS
from launcher.errors import UsageError

_TRAIN, _VAL = ("train", "training"), ("val", "validation", "test")
# So many entries of a folder show whether it is a class.
_LOOKED_AT = 50


def check_is_packed(path: str) -> None:
    """Raise UsageError where `path` holds folders of classes, with the command that packs it."""
    folder = Path(path)
    splits = [folder / name for name in _TRAIN if (folder / name).is_dir()]
    place = splits[0] if splits else folder
    if any((p / MANIFEST_NAME).is_file() for p in (place, folder)) or not _has_classes(place):
        return
    held_out = splits and any((folder / name).is_dir() for name in _VAL)
    out = shlex.quote(f"{folder.resolve().name}-shards")
    command = f"scl pack imagefolder {shlex.quote(path)} --out runs/data/{out}"
    if not held_out:
        command += " --val-fraction 0.1"
    raise UsageError(
        f"data.path: {path} holds folders of images, not shards: pack them once with `{command}`, "
        f"and train with --set data.path=runs/data/{out}"
    )


def _has_classes(folder: Path) -> bool:
    try:
        below = [entry for _, entry in zip(range(_LOOKED_AT), os.scandir(folder), strict=False)]
        return any(_holds_images(Path(entry.path)) for entry in below if entry.is_dir())
    except OSError:
        return False


def _holds_images(folder: Path) -> bool:
    entries = (entry for _, entry in zip(range(_LOOKED_AT), os.scandir(folder), strict=False))
    return any(entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for entry in entries)
