"""Where an evaluation is written."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError

FILES = ("eval.json", "eval.png", "confusion.png")


def check_room(out: Path) -> None:
    """Raise UsageError where an earlier evaluation would be overwritten."""
    if present := [name for name in FILES if (out / name).exists()]:
        raise UsageError(f"{out} holds {' and '.join(present)} already: choose another --out")
