"""The results of an evaluation as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.evaluation.measures import confusion_matrix

# So many classes of either end are shown; the file has them all.
_SHOWN = 10
# Of so many classes the whole matrix fits a terminal.
_MATRIX = 12


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report of `launcher.evaluation.report`."""
    console = console or Console(highlight=False)
    results, against = report["results"], report.get("against")
    table = Table(title=escape(f"{report['run']} on {report['data']}"), title_justify="left")
    table.add_column("")
    table.add_column(escape(report["run"]), justify="right")
    if against:
        table.add_column(escape(against["run"]), justify="right")
    beside = against["results"] if against else None
    for label, text in _rows(results).items():
        table.add_row(label, text, *([_rows(beside)[label]] if beside else []))
    console.print(table)
    if results["confusions"]:
        console.print(_confusions(results))
    if against is None:
        return
    console.print(
        f"They disagree on {100 * against['disagreement']:.2f} % of the samples; "
        f"{against['lost']:,} only {escape(against['run'])} has right, {against['gained']:,} only "
        f"{escape(report['run'])} (McNemar's exact test: p = {against['p']:.2g})",
        soft_wrap=True,
    )
    console.print(_classes(report["run"], against))


def _rows(results: dict[str, Any]) -> dict[str, str]:
    size = results["samples"]
    rows = {
        "top-1": f"{100 * results['top1']:.2f} % ({results['correct']:,} of {size:,})",
        "top-5": f"{100 * results['top5']:.2f} %",
    }
    if results["loss"] is not None:
        rows["loss"] = f"{results['loss']:.4f}"
        rows["calibration error"] = f"{100 * results['ece']:.2f} %"
    rows["corrupt"] = f"{results['corrupt']:,}"
    return rows


def _confusions(results: dict[str, Any]) -> Table:
    """The matrix where there are few classes, else the pairs that are mistaken most often."""
    names = [row["class"] for row in results["classes"]]
    if len(names) <= _MATRIX:
        table = Table(title="Which class (rows) is taken for which", title_justify="left")
        table.add_column("")
        for name in names:
            table.add_column(escape(name), justify="right")
        for name, row in zip(names, confusion_matrix(results).tolist(), strict=True):
            table.add_row(escape(name), *(f"{count:,}" if count else "·" for count in row))
        return table
    table = Table(title="Most often mistaken", title_justify="left")
    for name in ("class", "for", "samples", "of"):
        table.add_column(name, justify="left" if name in ("class", "for") else "right")
    sizes = {row["class"]: row["samples"] for row in results["classes"]}
    for row in results["confusions"][:_SHOWN]:
        name = row["class"]
        cells = (f"{row['samples']:,}", f"{sizes[name]:,}")
        table.add_row(escape(name), escape(row["predicted"]), *cells)
    return table


def _classes(run: str, against: dict[str, Any]) -> Table:
    """The classes that pay most, and those that gain most."""
    rows = against["classes"]
    table = Table(
        title="By class, greatest loss first; * holds at a false discovery rate of 5 %",
        title_justify="left",
    )
    table.add_column("class")
    for name in ("samples", against["run"], run, "points", "lost", "gained", "p"):
        table.add_column(escape(name), justify="right")
    left_out = max(0, len(rows) - 2 * _SHOWN)
    for index, row in enumerate(rows):
        if left_out and index == _SHOWN:
            table.add_row(f"… {left_out:,} more", *[""] * 7)
        if left_out and _SHOWN <= index < _SHOWN + left_out:
            continue
        table.add_row(
            escape(row["class"]),
            f"{row['samples']:,}",
            f"{row['dense']:,}",
            f"{row['sparse']:,}",
            f"{100 * row['change']:+.1f}",
            str(row["lost"]),
            str(row["gained"]),
            f"{row['p']:.2g}{' *' if row['significant'] else ''}",
        )
    return table
