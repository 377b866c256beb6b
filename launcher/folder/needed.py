"""What a command cannot do without, looked for before anything that takes seconds is imported."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError


def check_run(run: Path, *names: str) -> None:
    """Raises UsageError unless the folder `run` holds the files `names`, as a finished run does."""
    for name in names:
        if not (run / name).is_file():
            raise UsageError(
                f"{run} holds no {name}: give the folder of a finished run, such as runs/digits_scl"
            )


def check_path(path: Path, key: str) -> None:
    """Raises UsageError if there is nothing at `path`, which `key` names."""
    if not path.exists():
        raise UsageError(f"{key}: there is no file or folder {path}")
