"""Tables and charts for W&B, prepared from what a run has recorded over all its starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.folder.results import Run, is_number

# W&B shows that many rows of a table; of a longer course, epochs are left out evenly.
_MAX_ROWS = 10_000

_PREFIX = "density/"


class Table(NamedTuple):
    name: str
    columns: Sequence[str]
    rows: list[Any]


class Scatter(NamedTuple):
    """The columns `x` and `y` of `table`, against each other; named like it."""

    table: Table
    x: str
    y: str
    title: str


@dataclass(frozen=True)
class Charts:
    """What W&B is given at the end of a run."""

    tables: list[Table]
    scatters: list[Scatter]
    images: list[tuple[str, Path]]
    """(name, file)"""


def charts_of(run: Run, images: Sequence[Path]) -> Charts:
    """Charts of the evaluations that `run` recorded, and pictures that were drawn of it."""
    evaluations = [line for line in run.metrics if is_number(line.get("val/top1"))]
    return Charts(
        tables=[table for table in [_layers(evaluations)] if table.rows],
        scatters=[
            Scatter(table, "density", "top1", "Top-1 over density, a point for each epoch")
            for table in [_accuracy(evaluations)]
            if table.rows
        ],
        images=[(f"charts/{path.stem}", path) for path in images if path.is_file()],
    )


def _accuracy(evaluations: list[dict[str, Any]]) -> Table:
    """A row for each evaluation."""
    columns = {
        "step": "step",
        "epoch": "epoch",
        "density": "connections/density",
        "macs": "connections/macs",
        "top1": "val/top1",
        "top5": "val/top5",
    }
    rows = [[line.get(key) for key in columns.values()] for line in evaluations]
    return Table("charts/accuracy_density", [*columns], rows)


def _layers(evaluations: list[dict[str, Any]]) -> Table:
    """A row for each layer at each evaluation: what a heat map is made of."""
    layers = [key for key in (evaluations[-1] if evaluations else {}) if key.startswith(_PREFIX)]
    most = max(1, _MAX_ROWS // max(1, len(layers)))
    every = max(1, -(-len(evaluations) // most))
    chosen = evaluations[::-1][::every][::-1]
    rows = [
        [line["step"], line["epoch"], key.removeprefix(_PREFIX), line.get(key)]
        for line in chosen
        for key in layers
    ]
    return Table("charts/density_by_layer", ["step", "epoch", "layer", "density"], rows)
