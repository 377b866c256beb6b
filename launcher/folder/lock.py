"""Who writes to the folder of a run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from launcher.errors import UsageError


def lock(folder: Path) -> TextIO:
    """Make `folder` and hold it for this process, until the returned file is closed.

    Raises UsageError when another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(
            f"another process is training in {folder}: wait for it, stop it, or choose another "
            "folder with --set run_dir=…"
        ) from None
    return file


def check_writable(folder: Path) -> None:
    """Raise UsageError where `folder` cannot be made or written to; nothing is made."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UsageError(
            f"run_dir: {folder} cannot be made, for {place} is no folder: choose another with "
            "--set run_dir=…"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"run_dir: {folder} cannot be written, for {place} is read-only here or not yours: "
            "choose another with --set run_dir=…"
        )
