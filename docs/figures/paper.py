"""The figures and tables of docs/paper.md, from the runs of recipes/paper/.

    python docs/figures/paper.py [--runs runs] [lambda proxies normalize cost layers]

Writes docs/figures/paper_<figure>.png and prints one table per figure: means over three seeds, and
the standard deviation behind ±.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.folder.results import ReportError, Run, read_run

SEEDS = range(3)
LAMBDAS = ("0.01", "0.025", "0.05", "0.1", "0.2", "0.4", "0.8", "1.6")
# Those that other settings are tried at as well.
MIDDLE = ("0.1", "0.2", "0.4")
# λ in units of the normalised gradient, which are others for other divisors.
OF_DIVISOR = {
    "layer": MIDDLE,
    "feature": MIDDLE,
    "feature_norm": ("0.05", "0.1", "0.2"),
    "none": ("0.0001", "0.00025", "0.0005", "0.2"),
}


@dataclass(frozen=True)
class Seeds:
    """The runs of one setting."""

    runs: list[Run]

    def values(self, of: Callable[[Run], float]) -> list[float]:
        return [of(run) for run in self.runs]

    def mean(self, of: Callable[[Run], float]) -> float:
        return statistics.mean(self.values(of))

    def cell(self, of: Callable[[Run], float]) -> str:
        values = self.values(of)
        if min(values) == max(values):
            return percent(values[0])
        return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs, and the mean of a series there."""
        found = [run.series(name) for run in self.runs]
        return found[0][0], [statistics.mean(v) for v in zip(*(y for _, y in found), strict=True)]


class Runs:
    """The runs of the sweeps by name, such as `paper_lambda/scl-lam0.2`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Seeds:
        return Seeds([self._run(f"{name}-seed{seed}") for seed in SEEDS])

    def _run(self, name: str) -> Run:
        run = read_run(self._folder / name)
        if not run.summary:
            raise ReportError(f"{self._folder / name} is not finished: scl sweep recipes/paper/…")
        return run


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def top1(run: Run) -> float:
    return run.summary["top1"]


def density(run: Run) -> float:
    return run.summary["density"]


def macs(run: Run) -> float:
    return run.summary["macs"] / run.summary["macs_dense"]


def table(rows: Mapping[tuple[str, ...], Seeds], *names: str) -> None:
    """One row a setting, which `names` name the columns of."""
    print(f"| {' | '.join(names)} | top-1 | density | MACs |\n|{' --- |' * (len(names) + 3)}")
    for key, seeds in rows.items():
        cells = [*key, *(seeds.cell(of) for of in (top1, density, macs))]
        print(f"| {' | '.join(cells)} |")


def draw(axes: Axes, groups: Mapping[str, list[Seeds]], over: Callable[[Run], float]) -> None:
    """Top-1 over density or MACs: a point a run, a line through the means of a group's settings."""
    for (group, rows), marker in zip(groups.items(), "o^xsDv", strict=False):
        means = sorted((seeds.mean(over), seeds.mean(top1)) for seeds in rows)
        [line] = axes.plot(*zip(*means, strict=True), f"{marker}-", label=group, ms=5, lw=1)
        points = [(over(run), top1(run)) for seeds in rows for run in seeds.runs]
        axes.plot(*zip(*points, strict=True), ".", color=line.get_color(), ms=3, alpha=0.6)
    axes.set(xscale="log", ylabel="top-1")
    axes.legend(frameon=False, fontsize=8)
    in_percent(axes.xaxis, axes.yaxis)


def in_percent(*of: Axis) -> None:
    for axis in of:
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axis.set_minor_formatter(NullFormatter())


def draw_lambda(runs: Runs, figure: Figure) -> None:
    rows = {lam: runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS}
    dense = runs["paper_lambda/dense"]
    table({(lam,): seeds for lam, seeds in rows.items()} | {("dense",): dense}, "λ")
    left, right = figure.subplots(1, 2)
    for axes, of in ((left, density), (right, top1)):
        lams = [float(lam) for lam in rows]
        axes.plot(lams, [seeds.mean(of) for seeds in rows.values()], "o-", ms=5, lw=1, label="SCL")
        for lam, seeds in zip(lams, rows.values(), strict=True):
            axes.plot([lam] * len(SEEDS), seeds.values(of), ".", color="C0", ms=3, alpha=0.6)
        axes.set(xscale="log", xlabel="λ")
    left.set(yscale="log", ylabel="density")
    right.axhline(dense.mean(top1), color="0.5", ls="--", lw=1, label="dense")
    right.set(ylabel="top-1")
    right.legend(frameon=False)
    in_percent(left.yaxis, right.yaxis)


def draw_proxies(runs: Runs, figure: Figure) -> None:
    names = ("leaky_relu", "softplus", "relu", "clipped")
    rows = {"identity": runs["paper_lambda/scl-lam0.2"]}
    rows |= {name: runs[f"paper_proxies/scl-proxy{name}"] for name in names}
    table({(name,): seeds for name, seeds in rows.items()}, "proxy")
    left, right = figure.subplots(1, 2)
    for name, seeds in rows.items():
        left.plot(*seeds.series("connections/density"), label=name)
        right.plot(*seeds.series("masks/revivals"), label=name)
    left.set(yscale="log", xlabel="epoch", ylabel="density")
    right.set(yscale="symlog", xlabel="epoch", ylabel="masks that come back, in one update")
    left.legend(frameon=False, fontsize=8)
    in_percent(left.yaxis)


def draw_normalize(runs: Runs, figure: Figure) -> None:
    groups = {"network": {lam: runs[f"paper_lambda/scl-lam{lam}"] for lam in MIDDLE}}
    for name, lams in OF_DIVISOR.items():
        groups[name] = {lam: runs[f"paper_normalize/{name}-lam{lam}"] for lam in lams}
    table(
        {(group, lam): seeds for group, rows in groups.items() for lam, seeds in rows.items()},
        *("normalize", "λ"),
    )
    # A network that is gone would leave the others no room.
    del groups["none"]["0.2"]
    draw(figure.subplots(), {group: [*rows.values()] for group, rows in groups.items()}, density)
    figure.axes[0].set(xlabel="density")


def draw_cost(runs: Runs, figure: Figure) -> None:
    groups = {
        "connections": {lam: runs[f"paper_lambda/scl-lam{lam}"] for lam in MIDDLE},
        "macs": {lam: runs[f"paper_cost/macs-lam{lam}"] for lam in MIDDLE},
    }
    table(
        {(cost, lam): seeds for cost, rows in groups.items() for lam, seeds in rows.items()},
        *("cost", "λ"),
    )
    lists = {f"cost: {cost}": [*rows.values()] for cost, rows in groups.items()}
    for axes, over, label in zip(
        figure.subplots(1, 2), (density, macs), ("density", "MACs"), strict=True
    ):
        draw(axes, lists, over)
        axes.set(xlabel=label)


def draw_layers(runs: Runs, figure: Figure) -> None:
    rows = {lam: runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS[2:]}
    layers = [layer.name for layer in next(iter(rows.values())).runs[0].layers]
    names = [name.removesuffix(".weight") for name in layers]
    print(f"| λ | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    axes = figure.subplots()
    for i, (lam, seeds) in enumerate(rows.items()):
        densities = [
            seeds.mean(lambda run, place=place: run.layers[place].density)
            for place in range(len(names))
        ]
        print(f"| {lam} | {' | '.join(percent(density) for density in densities)} |")
        places = [place + 0.14 * (i - 2.5) for place in range(len(names))]
        colour = plt.get_cmap("viridis")(i / len(rows))
        axes.bar(places, densities, width=0.13, label=f"λ {lam}", color=colour)
    axes.set(yscale="log", ylabel="density", xticks=range(len(names)), xticklabels=names)
    axes.legend(frameon=False, ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    in_percent(axes.yaxis)


FIGURES = {
    "lambda": draw_lambda,
    "proxies": draw_proxies,
    "normalize": draw_normalize,
    "cost": draw_cost,
    "layers": draw_layers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    options = parser.parse_args()
    if unknown := set(options.figures) - FIGURES.keys():
        parser.error(f"no figure {sorted(unknown)[0]}: there are {', '.join(FIGURES)}")
    for name in options.figures or FIGURES:
        figure = plt.figure(figsize=(8, 3.6), layout="constrained")
        try:
            FIGURES[name](Runs(options.runs), figure)
        except ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for axes in figure.axes:
            axes.grid(alpha=0.3)
        figure.savefig(Path(__file__).with_name(f"paper_{name}.png"), dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
