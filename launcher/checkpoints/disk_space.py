"""Whether what is about to be written fits: better a sentence before than half a file after."""

from __future__ import annotations

import shutil
from pathlib import Path

# Beside the checkpoint itself: its manifest, metrics, what a file system needs to stay usable.
_MARGIN = 1.1
_MARGIN_BYTES = 2**20


def shortage(folder: Path, content: int) -> str | None:
    """What is missing to write `content` bytes into `folder`, as a phrase; None if it fits.

    `folder` need not exist yet. A quota is not seen here, only the free space of the file system.
    """
    needed = int(content * _MARGIN) + _MARGIN_BYTES
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    # Some file systems do not tell their size.
    if usage.free >= needed or not usage.total:
        return None
    return f"it needs {in_units(needed)} and {place} has {in_units(usage.free)} free"


def in_units(count: float) -> str:
    """Bytes in a readable unit: 831 B, 12.3 MB, 1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
