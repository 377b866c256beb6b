"""The comparison as tables: for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.compare.configurations import Comparison, Configuration, Stat
from launcher.folder.results import percent, si

MADE_BY = "scl compare"
_DIFFERENT = "What differs between the recipes"
# No terminal: wide enough that no cell is broken over two lines.
_WIDTH_OF_A_FILE = 200

STATISTICS = (
    *("top1", "top5", "density", "live", "connections", "macs", "macs_dense", "parameters"),
    *("train_seconds", "cost", "images_per_s", "world_size"),
)
"""What is written of every configuration, as mean and sample standard deviation."""


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, the statistic it shows, and what it says."""

    title: str
    key: str
    meaning: str


COLUMNS = (
    Column("top-1", "top1", "accuracy on the validation split"),
    Column("density", "density", "live share of all connections"),
    Column("connections", "live", "live connections"),
    Column("MACs", "macs", "multiply-accumulates of one forward pass that live connections do"),
    Column("training", "train_seconds", "time spent training, without evaluation"),
    Column(
        "cost",
        "cost",
        "arithmetic of the whole training, in dense epochs: epochs × forward and backward passes",
    ),
    Column("images/s", "images_per_s", "training throughput, median over the logged intervals"),
)


MILLISECONDS = Column(
    "ms", "milliseconds", "one image in the native runtime, one thread of this machine"
)


def columns(comparison: Comparison) -> list[Column]:
    """COLUMNS, and milliseconds behind MACs where they were measured."""
    if "milliseconds" not in comparison.costs:
        return [*COLUMNS]
    place = 1 + next(i for i, column in enumerate(COLUMNS) if column.key == "macs")
    return [*COLUMNS[:place], MILLISECONDS, *COLUMNS[place:]]


def statistics(comparison: Comparison) -> tuple[str, ...]:
    """STATISTICS, and milliseconds where they were measured."""
    return (*STATISTICS, *comparison.costs[2:])


def shown(stat: Stat | None, key: str) -> str:
    """`98.52 ± 0.21 %`; one run has no deviation; `–` where the value is missing."""
    if stat is None:
        return "–"
    if key == "top1":
        return _share(stat, 2)
    if key == "density":
        text = percent(stat.mean).removesuffix(" %")
        return _share(stat, len(text.partition(".")[2]))
    if key == "macs":
        return _with_prefix(stat)
    if key == "train_seconds":
        return _duration(stat)
    if key == "milliseconds":
        return f"{stat.mean:.3g}" + ("" if stat.std is None else f" ± {stat.std:.2g}")
    if key == "cost":
        # It follows from the recipe, and so is the same for all seeds.
        return f"{stat.mean:.4g}"
    deviation = "" if stat.std is None else f" ± {stat.std:,.0f}"
    return f"{stat.mean:,.0f}{deviation}"


def front_of(comparison: Comparison, index: int) -> str:
    """On which fronts a configuration is: `both` (with milliseconds, `all`), or the names."""
    on = [cost for cost in comparison.costs if index in comparison.front(cost)]
    if len(on) == len(comparison.costs):
        return "both" if len(on) == 2 else "all"
    return ", ".join({"macs": "MACs", "milliseconds": "ms"}.get(cost, cost) for cost in on)


def tables(comparison: Comparison) -> list[Table]:
    """One line per configuration, and, if they differ, the recipe keys in which they do."""
    result = Table()
    result.add_column("configuration", overflow="fold")
    result.add_column("method")
    for column in columns(comparison):
        result.add_column(column.title, justify="right")
    result.add_column("seeds")
    result.add_column("front")
    for index, c in enumerate(comparison.configurations):
        cells = [shown(c.stat(column.key), column.key) for column in columns(comparison)]
        seeds = f"{c.seeds} ({c.state})" if c.state else c.seeds
        style = "" if c.finished else "dim"
        front = front_of(comparison, index)
        result.add_row(escape(c.name), escape(c.method), *cells, escape(seeds), front, style=style)
    if not comparison.differences:
        return [result]
    return [result, _differences(comparison)]


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the tables and the warnings to stdout; plain text where there is no terminal."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_OF_A_FILE)
    for heading, table in zip((headline(comparison), _DIFFERENT), tables(comparison), strict=False):
        console.print(f"[bold]{heading}[/bold]")
        console.print(table)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}.", soft_wrap=True)


def headline(comparison: Comparison) -> str:
    """`5 configurations, 15 runs`."""
    configurations, runs = len(comparison.configurations), len(comparison.runs)
    return (
        f"{configurations} configuration{'s' if configurations != 1 else ''}, "
        f"{runs} run{'s' if runs != 1 else ''}"
    )


def as_csv(comparison: Comparison) -> str:
    """A line per configuration: every statistic's mean and deviation, then what differs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = statistics(comparison)
    means = [name for key in keys for name in (key, f"{key}_std")]
    writer.writerow(
        ["configuration", "method", "runs", "seeds", "finished", "front", *means]
        + [str(key) for key in comparison.differences]
    )
    for index, c in enumerate(comparison.configurations):
        stats = [c.stat(key) for key in keys]
        numbers = [n for s in stats for n in ((s.mean, s.std) if s else (None, None))]
        different = [row[index] for row in comparison.differences.values()]
        front = front_of(comparison, index)
        writer.writerow(
            [c.name, c.method, len(c.runs), c.seeds, c.finished, front, *numbers, *different]
        )
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Configurations with their statistics and runs, differences, warnings."""
    values = {
        "made_by": MADE_BY,
        "configurations": [
            _configuration(c, front_of(comparison, index), statistics(comparison))
            for index, c in enumerate(comparison.configurations)
        ],
        "differences": comparison.differences,
        "warnings": comparison.warnings,
    }
    return json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n"


def _configuration(c: Configuration, front: str, keys: Sequence[str]) -> dict[str, Any]:
    stats = {key: c.stat(key) for key in keys}
    runs = [
        {"name": r.name, "place": r.place, "seed": r.seed, "state": r.state()}
        | {key: r.value(key) for key in keys}
        for r in (*c.runs, *c.unfinished)
    ]
    return {
        "name": c.name,
        "method": c.method,
        "finished": c.finished,
        "front": front,
        "statistics": {key: asdict(stat) for key, stat in stats.items() if stat},
        "density_per_layer": c.densities(),
        "runs": runs,
    }


def differences_grid(comparison: Comparison) -> list[list[str]]:
    """The differences as rows of text, the first of them the heading; the shorter way round."""
    names = ["configuration", *(c.name for c in comparison.configurations)]
    columns = [[key, *map(setting, values)] for key, values in comparison.differences.items()]
    grid = [names, *columns]
    if len(columns) > len(comparison.configurations):
        return grid
    return [list(row) for row in zip(*grid, strict=True)]


def setting(value: Any) -> str:
    """A recipe's value as it stands there."""
    if value is None:
        return "null"
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(comparison: Comparison) -> Table:
    result = Table()
    heading, *rows = differences_grid(comparison)
    for index, text in enumerate(heading):
        result.add_column(escape(text), justify="right" if index else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def _share(stat: Stat, decimals: int) -> str:
    deviation = "" if stat.std is None else f" ± {100 * stat.std:.{decimals}f}"
    return f"{100 * stat.mean:.{decimals}f}{deviation} %"


def _with_prefix(stat: Stat) -> str:
    """The deviation in the unit and with the decimals of the mean: 47.5 ± 0.3 k."""
    if stat.std is None:
        return si(stat.mean)
    number, _, prefix = si(stat.mean).partition(" ")
    size = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    decimals = len(number.partition(".")[2])
    return f"{number} ± {stat.std / size:.{decimals}f}{' ' if prefix else ''}{prefix}"


def _duration(stat: Stat) -> str:
    """In seconds, minutes or hours, whichever leaves a readable number."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, float("inf"))):
        if stat.mean < limit:
            deviation = "" if stat.std is None else f" ± {stat.std / size:.1f}"
            return f"{stat.mean / size:.1f}{deviation} {unit}"
    return "–"
