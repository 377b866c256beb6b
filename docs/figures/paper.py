"""The figures and tables of docs/paper.md, from the runs of recipes/paper/.

    python docs/figures/paper.py [--runs runs] [lambda proxies normalize cost layers]

Writes docs/figures/paper_<figure>.png and prints one table per figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.folder.results import ReportError, Run, read_run

LAMBDAS = ("0.05", "0.1", "0.15", "0.25", "0.4", "0.6", "0.9")


class Runs:
    """The runs of the sweeps by name, such as `paper_lambda/scl-lam0.25`, of seed 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Run:
        path = self._folder / f"{name}-seed0"
        run = read_run(path)
        if not run.summary:
            raise ReportError(f"{path} is not finished: scl sweep recipes/paper/…")
        return run


def numbers(run: Run) -> tuple[float, float, float]:
    """Top-1, density and share of the MACs."""
    s: dict[str, Any] = run.summary
    return s["top1"], s["density"], s["macs"] / s["macs_dense"]


def table(rows: dict[str, Run]) -> None:
    print("| run | top-1 | density | MACs |\n| --- | --- | --- | --- |")
    for name, run in rows.items():
        top1, density, macs = numbers(run)
        print(f"| {name} | {top1:.2%} | {density:.2%} | {macs:.2%} |")


def draw_lambda(runs: Runs, figure: Figure) -> None:
    rows = {lam: runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS}
    dense = runs["paper_lambda/dense"]
    table({f"λ {lam}": run for lam, run in rows.items()} | {"dense": dense})
    left, right = figure.subplots(1, 2)
    lams = [float(lam) for lam in rows]
    left.plot(lams, [numbers(run)[1] for run in rows.values()], "o-")
    left.set(xscale="log", yscale="log", xlabel="λ", ylabel="density")
    right.plot(lams, [numbers(run)[0] for run in rows.values()], "o-", label="SCL")
    right.axhline(numbers(dense)[0], color="0.5", ls="--", lw=1, label="dense")
    right.set(xscale="log", xlabel="λ", ylabel="top-1")
    right.legend(frameon=False)


def draw_proxies(runs: Runs, figure: Figure) -> None:
    names = ("leaky_relu", "softplus", "relu", "clipped")
    rows = {"identity": runs["paper_lambda/scl-lam0.25"]}
    rows |= {name: runs[f"paper_proxies/scl-proxy{name}"] for name in names}
    table(rows)
    left, right = figure.subplots(1, 2)
    for name, run in rows.items():
        left.plot(*run.series("connections/density"), label=name)
        right.plot(*run.series("masks/revivals"), label=name)
    left.set(yscale="log", xlabel="epoch", ylabel="density")
    right.set(yscale="symlog", xlabel="epoch", ylabel="masks that come back, in one update")
    left.legend(frameon=False, fontsize=8)


def draw_normalize(runs: Runs, figure: Figure) -> None:
    groups = {
        "feature": {f"λ {lam}": runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS},
        "layer": {f"λ {lam}": runs[f"paper_normalize/layer-lam{lam}"] for lam in ("0.25", "0.4")},
        "none": {"λ 0.25": runs["paper_normalize/none"]},
        "none, mask_lr × 100": {
            f"λ {lam}": runs[f"paper_normalize/none_fast-lam{lam}"]
            for lam in ("0.0015", "0.003", "0.01")
        },
    }
    table({f"{group}, {name}": run for group, rows in groups.items() for name, run in rows.items()})
    axes = figure.subplots()
    for (group, rows), marker in zip(groups.items(), "o^xs", strict=True):
        found = sorted(numbers(run)[1::-1] for run in rows.values())
        # A cross lies in sight above what it covers.
        size = 12 if marker == "x" else 6
        axes.plot(*zip(*found, strict=True), f"{marker}-", label=group, ms=size, zorder=size)
    axes.set(xscale="log", xlabel="density", ylabel="top-1")
    axes.legend(frameon=False)


def draw_cost(runs: Runs, figure: Figure) -> None:
    groups = {
        "connections": [runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS[2:5]],
        "macs": [runs[f"paper_cost/macs-lam{lam}"] for lam in LAMBDAS[2:5]],
    }
    table(
        {
            f"{cost}, λ {lam}": run
            for cost, found in groups.items()
            for lam, run in zip(LAMBDAS[2:5], found, strict=True)
        }
    )
    for axes, place, label in zip(figure.subplots(1, 2), (1, 2), ("density", "MACs"), strict=True):
        for cost, found in groups.items():
            points = [(numbers(run)[place], numbers(run)[0]) for run in found]
            axes.plot(*zip(*points, strict=True), "o-", label=f"cost: {cost}")
        axes.set(xscale="log", xlabel=label, ylabel="top-1")
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["2 %", "5 %", "10 %", "20 %", "50 %"])
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False)


def draw_layers(runs: Runs, figure: Figure) -> None:
    rows = {f"λ {lam}": runs[f"paper_lambda/scl-lam{lam}"] for lam in LAMBDAS[2:]}
    names = [layer.name.removesuffix(".weight") for layer in next(iter(rows.values())).layers]
    print(f"| λ | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    axes = figure.subplots()
    for i, (label, run) in enumerate(rows.items()):
        densities = [layer.density for layer in run.layers]
        print(f"| {label} | {' | '.join(f'{density:.2%}' for density in densities)} |")
        places = [place + 0.16 * (i - 2) for place in range(len(names))]
        axes.bar(places, densities, width=0.15, label=label, color=plt.get_cmap("viridis")(i / 5))
    axes.set(yscale="log", ylabel="density", xticks=range(len(names)), xticklabels=names)
    axes.legend(frameon=False, ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))


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
