"""The tables of docs/training.md from what `benchmarks.additions` has run.

python -m benchmarks.additions --densities 5,2.5
python -m benchmarks.additions --task glyphs_resnet --densities 2.5
python docs/figures/additions.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.additions import compared
from benchmarks.front_lines import Line, read
from docs.figures.comparison import put_table

_HERE = Path(__file__).resolve().parent
TASKS = ("digits", "glyphs_resnet")


def lines_of(task: str) -> list[Line]:
    """The lines of the splits on which everything has been run that has been run on any."""
    lines = read(_HERE / "additions" / f"{task}.csv")
    known: dict[int, set[tuple[str, float]]] = defaultdict(set)
    for line in lines:
        known[line.split].add((line.name, line.asked))
    every = set().union(*known.values())
    return [line for line in lines if known[line.split] == every]


def table(lines: list[Line]) -> str:
    """Top-1 of each at each density, and by how many points it is more than without."""
    found = compared(lines)
    sparse = {asked: rows for asked, rows in found.items() if asked != "100 %"}
    head = ["", "splits", *(cell for asked in sparse for cell in (f"top-1 at {asked}", "more"))]
    rows = [head, ["---"] * len(head)]
    for name in next(iter(sparse.values())):
        rows.append(_row(name, [of_density[name] for of_density in sparse.values()]))
    for name, of_dense in found.get("100 %", {}).items():
        rows.append(_row(name, [of_dense] * len(sparse)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, found: list[dict[str, Any]]) -> list[str]:
    # Without anything added there is no difference.
    pairs = [(_cell(f["top-1"], " %"), _cell(f["more"]) if " " in name else "") for f in found]
    return [name, str(found[0]["top-1"]["runs"]), *(cell for pair in pairs for cell in pair)]


def _cell(found: dict[str, Any], unit: str = "") -> str:
    sign = "" if unit else "+"
    error = "" if found["error"] is None else f" ± {found['error']:.2f}"
    return f"{found['points']:{sign}.2f}{error}{unit}"


def main() -> None:
    for task in TASKS:
        name = f"additions, {task}, docs/figures/additions.py"
        put_table(name, table(lines_of(task)), "training.md")


if __name__ == "__main__":
    main()
