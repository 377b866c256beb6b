"""What `scl shrink` prints: before and after, and the latency promised and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(path: Path, console: Console | None = None) -> None:
    """Print the report in the file `path`."""
    console = console or Console(highlight=False, markup=False)
    report = json.loads(path.read_text(encoding="utf-8"))
    console.print(_table(report))
    for line in _lines(report):
        console.print(line, soft_wrap=True)
    folder = path.parent
    console.print(
        f"model {folder / 'model.safetensors'}, cut {folder / 'cut.json'}", soft_wrap=True
    )
    if (folder / "recipe.yaml").is_file():
        console.print(f"fine-tune it: scl train --recipe {folder / 'recipe.yaml'}", soft_wrap=True)
    console.print(f"all of this: {path}", soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    before, after = report["before"], report["after"]
    table = Table(title=f"{report['source']}, by {report['by']}", title_justify="left")
    for name in ("", "before", "after", ""):
        table.add_column(name, justify="right" if name else "left")
    for label, key in (("parameters", "parameters"), ("MACs", "macs")):
        table.add_row(
            label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}"
        )
    if before["top1"] is not None:
        change = 100 * (after["top1"] - before["top1"])
        table.add_row(
            "top-1", f"{before['top1']:.2%}", f"{after['top1']:.2%}", f"{change:+.2f} points"
        )
    return table


def _lines(report: dict[str, Any]) -> list[str]:
    lines = []
    if "promised_ms" in report:
        lines.append(
            f"latency: {report['today_ms']:.4g} ms today, promised {report['promised_ms']:.4g} ms, "
            f"measured {report['measured_ms']:.4g} ms (promised {report['error']:+.1%}), by "
            f"{report['clock']}; asked for {report['budget_ms']:.4g} ms"
        )
        if report["promised_ms"] > report["budget_ms"]:
            lines.append("the budget is not met: the next cut on the way to it lost too much")
    if "difference" in report:
        kind = "without loss" if report["lossless"] else "nearest to dependent"
        lines.append(f"{kind}: outputs differ by {report['difference']:.1e} of the largest")
    kept = [cut for cut in report.get("cuts", []) if cut["kept"]]
    if kept:
        lines.append(f"{len(kept)} cuts kept of {len(report['cuts'])} tried")
    return lines
