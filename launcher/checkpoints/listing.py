"""The checkpoints of a run as a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.checkpoints.disk_space import in_units
from launcher.checkpoints.manifest import (
    Manifest,
    folders,
    manifests,
    problems,
    read_pointer,
    root_of,
)
from launcher.checkpoints.retention import Evaluated, read_pareto
from launcher.folder.results import percent

_COLUMNS = ("checkpoint", "epoch", "top-1", "density", "live", "size", "ranks", "ZeRO")


def show(run: Path, console: Console | None = None) -> None:
    """Print one row a checkpoint, oldest save first, then those of the Pareto list that are gone.

    Raises UsageError where there are none.
    """
    root = root_of(run)
    # In a file or a pipe nothing needs to be cut to fit.
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    front = read_pareto(root)
    console.print(_table(root, front))
    for folder in folders(root):
        for problem in problems(folder, read_content=False):
            console.print(f"{folder.name} is damaged: {problem}", soft_wrap=True)
    gone = [entry for entry in front if not (root / entry.checkpoint).is_dir()]
    if gone:
        console.print("\nsurpassed by none, no longer on disk:")
    for entry in gone:
        console.print(
            f"  {entry.checkpoint}  top-1 {entry.top1:.2%}  density {percent(entry.density)}"
            f"{'' if entry.final else ', masks not final'}"
        )


def _table(root: Path, front: list[Evaluated]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        justify = "left" if column == "checkpoint" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    table.add_column("")
    known = manifests(root)
    latest, best = (read_pointer(root, pointer)[0] for pointer in ("latest", "best"))
    on_front = {entry.checkpoint for entry in front}
    unreadable = [folder.name for folder in folders(root) if folder.name not in known]
    for name in [*known, *unreadable]:
        marks = {"latest": name == latest, "best": name == best, "pareto": name in on_front}
        notes = [mark for mark, holds in marks.items() if holds]
        notes += ["damaged"] if problems(root / name, read_content=False) else []
        row = _row(known[name]) if name in known else [""] * (len(_COLUMNS) - 1)
        table.add_row(name, *row, ", ".join(notes))
    return table


def _row(manifest: Manifest) -> list[str]:
    meta: dict[str, Any] = manifest.meta
    result = manifest.evaluation
    achieved = ["–", "–", "–"]
    if result is not None:
        density = percent(result.live / result.connections if result.connections else 1.0)
        achieved = [f"{result.top1:.2%}", density, f"{result.live:,}"]
    return [
        f"{(manifest.step - meta['progress'].get('shift', 0)) / meta['steps_per_epoch']:.2f}",
        *achieved,
        in_units(sum(file.bytes for file in manifest.files.values())),
        str(meta["environment"]["world_size"]),
        str(meta["recipe"]["engine"]["zero_stage"]),
    ]
