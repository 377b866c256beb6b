"""Everything that a comparison leaves in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from data.files import atomic_write
from launcher.compare.configurations import Comparison
from launcher.compare.table import MADE_BY, as_csv, as_json
from launcher.errors import UsageError

_NAMES = ("accuracy.png", "curves.png", "layers.png", "table.csv", "table.json", "index.html")


def check_out(folder: Path) -> None:
    """Raises UsageError if `folder` cannot be made, or holds files of these names by others."""
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise UsageError(f"--out {folder} is not a folder: choose another")
    taken = [name for name in _NAMES if (folder / name).exists()]
    if taken and not _is_ours(folder / "table.json"):
        raise UsageError(
            f"--out {folder} holds {taken[0]}, which scl compare did not write: choose another "
            "folder"
        )


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write tables, figures and the page into `folder`; their paths, the page last.

    An earlier comparison there is replaced. Raises UsageError as `check_out` does.
    """
    check_out(folder)

    # Not before there is something to draw: they import matplotlib.
    from launcher.compare.courses import courses
    from launcher.compare.figures import accuracy, png
    from launcher.compare.layers import layers
    from launcher.compare.page import page

    contents: dict[str, bytes | str] = {
        # First, so that a folder left half-way is known as one of these.
        "table.json": as_json(comparison),
        "table.csv": as_csv(comparison),
        "accuracy.png": png(accuracy(comparison)),
        "curves.png": png(courses(comparison)),
        "layers.png": png(layers(comparison)),
        "index.html": page(comparison),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}") from error
    return [folder / name for name in contents]


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False
