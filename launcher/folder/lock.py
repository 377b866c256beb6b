"""Who writes to the folder of a run."""

from __future__ import annotations

import fcntl
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
