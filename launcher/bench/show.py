"""What `scl bench` prints."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.folder.results import percent

_ZEROS = (
    "Dense kernels multiply zeros like other numbers: there single connections that are missing "
    "make no layer faster. What helps is native, which leaves them out (scl export --format "
    "native), fewer features (scl export --remove-dead), or 2:4 on a GPU."
)


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """The table, what was not run, what the zeros are worth, and all of it as a line of JSON."""
    console = console or Console(highlight=False, markup=False)
    macs = report["macs"]
    console.print(
        f"{report['network']['model']}, {percent(report['density'])} of the connections live "
        f"({macs['live'] / 1e6:,.3g} of {macs['dense'] / 1e6:,.3g} million MACs); "
        f"{report['machine']}",
        soft_wrap=True,
    )
    for threads in report["threads"]:
        console.print(latency_table(report, threads))
    if report["memory"]:
        console.print(memory_table(report))
    for name, why in report["not_run"].items():
        console.print(f"not run: {name}: {why}", soft_wrap=True)
    sizes = [f"{name} {size:,}" for name, size in report["bytes"].items()]
    if sizes:
        console.print(f"bytes of the file: {', '.join(sizes)}", soft_wrap=True)
    console.print(_ZEROS, soft_wrap=True)
    console.print(json.dumps(report), soft_wrap=True)


def latency_table(report: dict[str, Any], threads: int) -> Table:
    """Milliseconds of each form at each batch size: median (5th–95th percentile) and ratio."""
    of_threads = [row for row in report["milliseconds"] if row["threads"] == threads]
    batches = sorted({row["batch"] for row in of_threads})
    title = f"milliseconds per batch (5th–95th percentile), {threads} thread{'s' * (threads > 1)}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
        table.add_column("÷ first", justify="right")
    by_form: dict[str, dict[int, dict[str, Any]]] = {}
    for row in of_threads:
        by_form.setdefault(row["form"], {})[row["batch"]] = row
    for form, rows in by_form.items():
        cells = []
        for batch in batches:
            row = rows[batch]
            spread = f"({_ms(row['p5'])}–{_ms(row['p95'])})"
            cells += [f"{_ms(row['median'])} {spread}", f"{row['ratio']:.2f}"]
        table.add_row(form, *cells)
    return table


def memory_table(report: dict[str, Any]) -> Table:
    """Megabytes at the peak of a process that runs one form: beyond its imports, and in all."""
    keys = sorted({(row["batch"], row["threads"]) for row in report["memory"]})
    table = Table(title="MB at the peak, beyond imports (in all)", title_justify="left")
    table.add_column("", no_wrap=True)
    for batch, threads in keys:
        table.add_column(f"batch {batch}, {threads} thread{'s' * (threads > 1)}", justify="right")
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for row in report["memory"]:
        text = f"{(row['peak'] - row['before']) / 1e6:.1f} ({row['peak'] / 1e6:.0f})"
        cells.setdefault(row["form"], {})[row["batch"], row["threads"]] = text
    for form, found in cells.items():
        table.add_row(form, *(found[key] for key in keys))
    return table


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
