"""The runs to compare: found in folders, read once, with what is needed of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.compare.entry import Entry
from launcher.folder.results import (
    ReportError,
    is_run_folder,
    read_recipe,
    read_run,
)

# entity/project or entity/project/run_id; W&B allows no other signs in them.
_WANDB_PATH = re.compile(r"[\w-]+/[\w.-]+(/[\w-]+)?")


def read_entries(runs: Iterable[str | Path]) -> list[Entry]:
    """All runs that are named, or lie in a folder that is; each once, in the order given.

    A name is a folder, or `entity/project[/run_id]` of W&B where there is no such folder.
    Raises ReportError: a name that is neither, a folder without runs, a file that cannot be read.
    """
    entries: dict[str, Entry] = {}
    for name in runs:
        for entry in _read(str(name)):
            entries.setdefault(entry.place, entry)
    return list(entries.values())


def _read(name: str) -> Iterator[Entry]:
    folder = Path(name)
    if folder.is_dir():
        folders = list(_run_folders(folder))
        if not folders:
            raise ReportError(
                f"{folder} is no run folder and holds none: give folders that scl train wrote, or "
                "a folder of them."
            )
        yield from (_read_folder(path) for path in folders)
    elif folder.exists():
        raise ReportError(f"{folder} is a file: give the folder of the run.")
    elif _WANDB_PATH.fullmatch(name):
        from launcher.compare.wandb_runs import read_wandb

        yield from read_wandb(name)
    else:
        raise ReportError(f"There is no run folder {folder}.")


def _run_folders(folder: Path) -> Iterator[Path]:
    """The run folders at and below `folder`, in the order of their names; none inside a run."""
    if is_run_folder(folder):
        yield folder
        return
    try:
        with os.scandir(folder) as listing:
            below = sorted(e.name for e in listing if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ReportError(f"{folder} cannot be read: {error.strerror}.") from error
    for name in below:
        yield from _run_folders(folder / name)


def _read_folder(run_dir: Path) -> Entry:
    run, recipe = read_run(run_dir), read_recipe(run_dir)
    return Entry(
        name=str(run.summary.get("name") or recipe.get("name") or run_dir.resolve().name),
        place=str(run_dir.resolve()),
        recipe=recipe,
        run=run,
        densities={layer.name: layer.density for layer in run.layers},
    )
