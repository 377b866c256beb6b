"""The runs to compare: found in folders, read once, with what is needed of each."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.folder.results import (
    ReportError,
    Run,
    is_number,
    is_run_folder,
    latest,
    read_recipe,
    read_run,
)

# entity/project or entity/project/run_id; W&B allows no other signs in them.
_WANDB_PATH = re.compile(r"[\w-]+/[\w.-]+(/[\w-]+)?")
_EPOCHS = "optim.epochs"


@dataclass(frozen=True, eq=False)
class Entry:
    """One run; without a recipe, `recipe` is empty. `densities`: layer → live share.

    `data` tells its data from others: the fingerprint of the shards, else their path.
    """

    name: str
    place: str
    recipe: dict[str, Any]
    run: Run
    densities: dict[str, float]
    data: str | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe, flat: `method.lam` → 0.28."""
        return dict(flatten(self.recipe))

    @property
    def finished(self) -> bool:
        """Whether the run has written its results."""
        return bool(self.run.summary)

    @property
    def method(self) -> str:
        return str(self.run.summary.get("method") or self.settings.get("method.name") or "unknown")

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    def value(self, key: str) -> float | None:
        """What the summary says of `key`, of an unfinished run the latest; None if nothing.

        `images_per_s` is the median over the intervals that were logged.
        """
        if key == "images_per_s":
            rates = self.run.series("speed/images_per_s")[1]
            return statistics.median(rates) if rates else None
        value = latest(self.run).get(key)
        return float(value) if is_number(value) else None

    def state(self) -> str:
        """`finished`, or how far the run has come."""
        if self.finished:
            return "finished"
        lines = self.run.metrics
        epoch = max((line["epoch"] for line in lines if is_number(line.get("epoch"))), default=0)
        epochs = self.settings.get(_EPOCHS)
        return f"epoch {epoch:.4g} of {epochs}" if epochs else f"epoch {epoch:.4g}"


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


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(name: str) -> Iterator[Entry]:
    folder = Path(name)
    if folder.is_dir():
        found = list(_run_folders(folder))
        if not found:
            raise ReportError(
                f"{folder} is no run folder and holds none: give folders that scl train wrote, or "
                "a folder of them."
            )
        yield from (_read_folder(path) for path in found)
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
