"""The tables and the figure of docs/comparison.md from what `benchmarks.front` has run.

python -m benchmarks.front --task digits --splits 0-7
python docs/figures/front.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.front_compare import compared, is_ours
from benchmarks.front_lines import Line, read
from benchmarks.front_tasks import METHODS
from docs.figures.comparison import put_table

TASKS = ("digits", "glyphs_resnet", "glyphs_lenet")
_HERE = Path(__file__).resolve().parent
_LEAST = 8


def lines_of(task: str) -> list[Line]:
    return read(_HERE / "front" / f"{task}.csv")


def whole(lines: list[Line]) -> list[Line]:
    """What has been run on at least eight splits: what can be compared and drawn."""
    splits: dict[tuple[str, float], set[int]] = defaultdict(set)
    for line in lines:
        splits[line.name, line.asked].add(line.split)
    return [line for line in lines if len(splits[line.name, line.asked]) >= _LEAST]


def spread_table(lines: list[Line]) -> str:
    """Top-1 of each method at each density asked for; mean ± standard error, and of fewer than
    eight splits of how many."""
    asked = sorted({line.asked for line in lines if line.asked < 1}, reverse=True)
    rows = [
        f"| method | {' | '.join(f'{100 * d:g} %' for d in asked)} |",
        "| --- |" + " --- |" * len(asked),
    ]
    for name in _names(lines):
        cells = [_cell([x for x in lines if x.name == name and x.asked == d]) for d in asked]
        rows.append(f"| {f'**{name}**' if name == 'scl' else name} | {' | '.join(cells)} |")
    dense = [line for line in lines if line.name == "dense"]
    rows.append(f"| dense | {' | '.join([_cell(dense)] * len(asked))} |")
    return "\n".join(rows)


def _names(lines: list[Line]) -> list[str]:
    found = sorted({line.name for line in lines} - {"dense"})
    return [*(n for n in found if is_ours(n)), *(n for n in found if not is_ours(n))]


def _cell(lines: list[Line]) -> str:
    newest = {line.split: line.top1 for line in lines}
    if not newest:
        return "–"
    values = 100 * np.array([*newest.values()])
    if len(values) == 1:
        return f"{values[0]:.2f} % (1)"
    spread = f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f} %"
    return spread if len(values) >= _LEAST else f"{spread} ({len(values)})"


def gap_table(lines: list[Line]) -> str:
    """SCL's top-1 less that of each rival at SCL's density, split by split."""
    result = compared(lines)
    rivals = sorted({r for each in result.values() for r in each.get("scl", {"less": {}})["less"]})
    rows = [
        f"| density | {' | '.join(f'less {rival}' for rival in rivals)} |",
        "| --- |" + " --- |" * len(rivals),
    ]
    for density, each in result.items():
        if "scl" in each:
            less = each["scl"]["less"]
            cells = [
                f"{less[r]['points']:+.2f} ± {less[r]['error']:.2f}" if r in less else "–"
                for r in rivals
            ]
            rows.append(f"| {density} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(lines: list[Line], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    asked = sorted({line.asked for line in lines if line.asked < 1})
    names = [name for name in _names(lines) if name.split() == [name]]
    for name in names:
        points = [
            (100 * d, 100 * np.array([x.top1 for x in lines if x.name == name and x.asked == d]))
            for d in asked
        ]
        points = [(d, values) for d, values in points if len(values)]
        axes.errorbar(
            [d for d, _ in points],
            [values.mean() for _, values in points],
            [values.std(ddof=1) / len(values) ** 0.5 for _, values in points],
            marker="o",
            ms=4,
            lw=2.2 if name == "scl" else 1,
            color="#0072b2" if name == "scl" else f"C{[*METHODS].index(name)}",
            label=name,
            capsize=2,
        )
    # Rivals that fall out below are as good as not there.
    lowest = min(x.top1 for x in lines if x.name == "scl")
    axes.set(xscale="log", xlabel="density, %", ylabel="top-1, %")
    axes.set_ylim(bottom=100 * lowest - 10)
    axes.xaxis.set_ticks([100 * d for d in asked], [f"{100 * d:g}" for d in asked])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    for task in TASKS:
        lines = lines_of(task)
        put_table(f"front, {task}, docs/figures/front.py", spread_table(lines))
        put_table(f"front less rivals, {task}, docs/figures/front.py", gap_table(whole(lines)))
        draw(whole(lines), _HERE / f"front_{task}.png")


if __name__ == "__main__":
    main()
