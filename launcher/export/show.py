"""What `scl export` prints: the files, the sizes, and what not to expect of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.folder.results import percent


def show(report: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print the report of an export; plain text where there is no terminal."""
    console = console or Console(highlight=False, markup=False)

    def line(text: str) -> None:
        # soft_wrap: a path broken over two lines cannot be copied.
        console.print(text, soft_wrap=True)

    line(_headline(report))
    for name, file in report["files"].items():
        line(f"{out / file['file']}  ({name}, {file['bytes']:,} bytes)")
        line(f"  checked: {file['checked']}")
        line(f"  speed:   {file['speed']}")
    for text in _changes(report["changes"]):
        line(text)
    if report["sizes"]:
        console.print(sizes_table(report["sizes"]))
    if report["2:4"]:
        console.print(patterns_table(report["2:4"]))
    for what, top1 in report["accuracy"].items():
        line(f"top-1, {what}: {top1:.2%}")
    line(f"all of this: {out / 'export.json'}")


def _headline(report: dict[str, Any]) -> str:
    source, network = report["source"], report["network"]
    unfinished = ""
    if not source["finished"]:
        unfinished = f", not finished: as it was at step {source['step']:,}"
    return (
        f"{network['model']} from {source['file']}{unfinished}: {report['live']:,} of "
        f"{report['connections']:,} connections live ({percent(report['density'])})"
    )


def _changes(changes: dict[str, Any]) -> list[str]:
    lines = []
    if "removed" in changes:
        lines += _removed(changes["removed"])
    if "folded" in changes:
        lines.append(f"batch norms folded: {len(changes['folded'])}")
        lines += [f"  not {name}: {why}" for name, why in changes["not_folded"].items()]
    if lines:
        lines.append(f"largest difference of the outputs since: {changes['difference']:.1e}")
    return lines


def _removed(removed: dict[str, Any]) -> list[str]:
    lines = [
        f"dead features removed: {removed['features_before'] - removed['features_after']:,} of "
        f"{removed['features_before']:,}; parameters {removed['parameters_before']:,} → "
        f"{removed['parameters_after']:,}"
    ]
    lines += [f"  {count:,} stay: {reason}" for reason, count in removed["left"].items()]
    if removed["problem"]:
        lines.append(f"  none removed: {removed['problem']}")
    return lines


def sizes_table(sizes: list[dict[str, Any]]) -> Table:
    """Bytes of each form of the model, and how many times smaller than dense."""
    table = Table(title="sizes", title_justify="left")
    for name in ("", "bytes", "positions", "values", "smaller"):
        table.add_column(name, justify="left" if not name else "right")
    dense = sizes[0]["bytes"]
    for size in sizes:
        parts = [
            f"{size[key]:,}" if size[key] is not None else "" for key in ("positions", "values")
        ]
        table.add_row(size["what"], f"{size['bytes']:,}", *parts, f"{dense / size['bytes']:.1f}×")
    return table


def patterns_table(patterns: list[dict[str, Any]]) -> Table:
    """2:4, layer by layer."""
    table = Table(title="2:4", title_justify="left")
    table.add_column("weight", no_wrap=True)
    for name in ("kind", "shape", "2:4", "on sparse tensor cores"):
        table.add_column(name)
    for p in patterns:
        state = "yes" if p["holds"] else f"no: {p['broken']:,} of {p['blocks']:,} blocks"
        takes = "yes" if p["qualifies"] else p["hardware"] or "no"
        table.add_row(p["name"], p["kind"], "×".join(map(str, p["shape"])), state, takes)
    return table
