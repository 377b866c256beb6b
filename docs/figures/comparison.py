"""Tables and a figure of docs/comparison.md, from the runs of its sweeps.

    python docs/figures/comparison.py [--task glyphs]

Writes the table of a task into the document, between its two comments. That of the digits is drawn
as well, into docs/figures/comparison_digits.png: of one density a figure shows less than its table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data.files import atomic_write
from launcher.compare import Comparison, Configuration, Stat, compare_runs
from launcher.compare.figures import accuracy, png
from sclcore.registry import known_methods

_DOCS = Path(__file__).resolve().parents[1]
_RUNS = {"digits": Path("runs/compare_digits"), "glyphs": Path("runs/compare_glyphs")}
_KNOBS = (
    *("method.target_density", "method.lam", "method.density", "method.s_weight_decay"),
    *("method.iterations", "method.radius", "method.power"),
)


def table(comparison: Comparison) -> str:
    """Markdown; densities fall within a method. In bold what is on the front of density."""
    dense = next(c for c in comparison.configurations if c.method == "dense")
    front = {comparison.configurations[i].name for i in comparison.front("density")}
    order = [*known_methods()]
    finished = [c for c in comparison.configurations if c.finished]
    finished.sort(key=lambda c: (order.index(c.method), -(c.mean("density") or 0)))
    rows = [
        "| method | setting | seeds | top-1 | density | MACs | cost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *(_row(c, dense, c.name in front) for c in finished)])


def _row(c: Configuration, dense: Configuration, bold: bool) -> str:
    knobs = [
        f"{key.removeprefix('method.')} {c.settings[key]}"
        for key in _KNOBS
        if c.settings.get(key) is not None
    ]
    macs, cost = (_share(c, dense, key) for key in ("macs", "cost"))
    cells = [
        f"**{c.method}**" if bold else c.method,
        ", ".join(knobs) or "–",
        c.seeds,
        _percent(c.stat("top1"), 2),
        _percent(c.stat("density"), 2),
        f"{100 * macs:.1f} %",
        f"{cost:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _share(c: Configuration, dense: Configuration, key: str) -> float:
    mine, theirs = c.mean(key), dense.mean(key)
    assert mine is not None and theirs
    return mine / theirs


def _percent(stat: Stat | None, digits: int) -> str:
    assert stat is not None
    spread = f" ± {100 * stat.std:.{digits}f}" if stat.std else ""
    return f"{100 * stat.mean:.{digits}f}{spread} %"


def put_table(name: str, text: str, document_name: str = "comparison.md") -> None:
    """Write a table into a document, between the comment that names it and the next end."""
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    document = _DOCS / document_name
    before, rest = document.read_text().split(begin)
    after = rest.partition(end)[2]
    atomic_write(document, f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*_RUNS], default="digits")
    task = parser.parse_args().task
    comparison = compare_runs([_RUNS[task]])
    if task == "digits":
        atomic_write(_DOCS / "figures" / "comparison_digits.png", png(accuracy(comparison)))
    put_table(f"{task}, docs/figures/comparison.py", table(comparison))


if __name__ == "__main__":
    main()
