"""Shows a run as one short table from what its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.folder.results import latest, name_of, read_run, rows_of


def table(run_dir: Path, dense: dict[str, Any] | None = None) -> Table:
    """The run's outcome in a few rows; with `dense`, the summary of its dense twin, beside that.

    Raises ReportError.
    """
    run = read_run(run_dir)
    name = escape(name_of(run, run_dir))
    result = Table(title=name, title_justify="left", show_header=dense is not None)
    result.add_column("")
    result.add_column(escape(str(run.summary.get("method", "this run"))), justify="right")
    rows = rows_of(latest(run))
    if dense is None:
        for label, value in rows.items():
            result.add_row(label, value)
        return result
    result.add_column("dense", justify="right")
    beside = rows_of(dense)
    for label, value in rows.items():
        result.add_row(label, value, beside.get(label, "–"))
    return result


def show(
    run_dir: Path, dense: dict[str, Any] | None = None, console: Console | None = None
) -> None:
    """Print the table, then where everything was written; plain text where there is no terminal.

    Raises ReportError.
    """
    console = console or Console(highlight=False)
    console.print(table(run_dir, dense))
    artifacts = read_run(run_dir).summary.get("artifacts") or {}
    width = max(map(len, artifacts), default=0)
    for name, path in artifacts.items():
        # soft_wrap: a path broken over two lines cannot be copied.
        console.print(f"{name:<{width}}  {path}", soft_wrap=True, markup=False)
