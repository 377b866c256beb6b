"""Top-1, density and loss over epochs: means over seeds, with bands of one standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from launcher.compare.configurations import Comparison, Configuration
from launcher.compare.figures import PANEL, Titles, columns_of, figure_of, looks, put_legend
from launcher.folder.results import Course, Run
from launcher.reports.style import GREY, accuracy_axis, bare, by_epoch, density_axis, heading

# More names than these are no legend any more.
MOST_NAMES = 12
_POINTS = 160
_LEGEND_ROW_IN = 0.23
_LEGEND_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One of the figure's panels: a heading and the metric it shows."""

    key: str
    heading: str
    metric: str


PANELS = (
    Panel("top1", "Top-1 accuracy on validation", "val/top1"),
    Panel("density", "Density, logarithmic", "connections/density"),
    Panel("loss", "Training loss, logarithmic", "train/loss"),
)


@dataclass(frozen=True)
class Band:
    """Mean and sample standard deviation (0 for one run) over the runs at each epoch."""

    epochs: list[float]
    mean: list[float]
    std: list[float]


def courses(comparison: Comparison) -> Figure:
    """The three panels side by side, with the configurations named below."""
    handles = legend(comparison)
    columns = columns_of(handles, _LEGEND_COLUMNS, len(PANELS) * PANEL[0])
    rows = -(-len(handles) // columns)
    figure, axes = figure_of(len(PANELS), height=PANEL[1] + 0.1 + rows * _LEGEND_ROW_IN)
    for panel, axis in zip(PANELS, axes, strict=True):
        draw_courses(axis, comparison, panel)
    put_legend(figure, handles, _LEGEND_COLUMNS)
    return figure


def legend(comparison: Comparison) -> list[Line2D]:
    """A handle for each configuration; for each method where they are too many."""
    strengths = strengths_of(comparison)
    if len(strengths) > MOST_NAMES:
        return [
            Line2D([], [], color=color, linewidth=2, label=f"{method} (paler: denser)")
            for method, (color, _) in looks(comparison).items()
        ]
    return [
        Line2D(
            [],
            [],
            color=looks(comparison)[c.method][0],
            alpha=strengths[index],
            linewidth=2,
            linestyle="-" if c.finished else ":",
            label=c.name if c.finished else f"{c.name} (unfinished)",
        )
        for index, c in enumerate(comparison.configurations)
    ]


def draw_courses(
    axes: Axes, comparison: Comparison, panel: Panel, titles: Titles | None = None
) -> None:
    """One metric over epochs, a line for each configuration in the colour of its method."""
    heading(axes, panel.heading)
    bare(axes, grid="y")
    axes.set_xlabel("epoch", fontsize=9.5, color=GREY, labelpad=3)
    strengths, colors = strengths_of(comparison), looks(comparison)
    bands = {
        index: band
        for index, c in enumerate(comparison.configurations)
        if (band := band_of(c, panel)) is not None
    }
    _value_axis(axes, panel, list(bands.values()))
    last = max((band.epochs[-1] for band in bands.values()), default=1.0)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=last >= 2))
    for index, band in bands.items():
        c = comparison.configurations[index]
        color, strength = colors[c.method][0], strengths[index]
        mean, std = np.array(band.mean), np.array(band.std)
        artists: list[Artist] = []
        if std.any():
            # Not below 0, for which a logarithmic axis has no place.
            low = np.maximum(mean - std, mean / 10)
            shade = {"color": color, "alpha": 0.13 * strength, "linewidth": 0}
            artists.append(axes.fill_between(band.epochs, low, mean + std, **shade))
        artists += axes.plot(
            band.epochs,
            band.mean,
            color=color,
            alpha=strength,
            linewidth=1.7,
            linestyle="-" if c.finished else ":",
            marker="o" if len(band.epochs) == 1 else None,
            markersize=4,
        )
        for artist in artists:
            if titles is None:
                break
            titles.put(artist, index, c.name if c.finished else f"{c.name} ({c.state})")


def band_of(c: Configuration, panel: Panel) -> Band | None:
    """Mean over the runs, at the epochs of the longest series, as far as all of them go."""
    series = [course for run in c.runs if (course := _course(run.run, panel))[0]]
    if not series:
        return None
    start = max(epochs[0] for epochs, _ in series)
    end = min(epochs[-1] for epochs, _ in series)
    longest = max((epochs for epochs, _ in series), key=len)
    grid = [epoch for epoch in longest if start <= epoch <= end] or [end]
    grid = [grid[i] for i in sorted({round(x) for x in np.linspace(0, len(grid) - 1, _POINTS)})]
    values = np.array([np.interp(grid, epochs, values) for epochs, values in series])
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(grid))
    return Band(grid, values.mean(axis=0).tolist(), std.tolist())


def strengths_of(comparison: Comparison) -> list[float]:
    """Opacity of each configuration: full for the sparsest of a method, paler for denser ones."""
    strengths = []
    for c in comparison.configurations:
        same = [other for other in comparison.configurations if other.method == c.method]
        order = sorted(same, key=lambda other: (other.mean("density") or 0.0, other.name))
        rank = order.index(c) / max(len(order) - 1, 1)
        strengths.append(1.0 - 0.65 * rank)
    return strengths


def _course(run: Run, panel: Panel) -> Course:
    epochs, values = run.series(panel.metric)
    if panel.key == "loss":
        return by_epoch(epochs, values)
    if panel.key == "density" and not epochs:
        # A dense run need not record its density: it is what it ends with.
        ends, final = run.series("val/top1")[0], run.summary.get("density")
        if ends and final is not None:
            return [0.0, ends[-1]], [float(final)] * 2
    return epochs, values


def _value_axis(axes: Axes, panel: Panel, bands: list[Band]) -> None:
    values = [value for band in bands for value in band.mean]
    if panel.key == "top1":
        accuracy_axis(axes, values)
    elif panel.key == "density":
        density_axis(axes, values)
    elif any(value > 0 for value in values):
        axes.set_yscale("log")
        low, high = min(value for value in values if value > 0), max(values)
        axes.set_ylim(low / 1.2, high * 1.2)
        ticks = [step * 10.0**power for power in range(-9, 4) for step in (1, 2, 5)]
        axes.set_yticks([tick for tick in ticks if low / 1.2 <= tick <= high * 1.2])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
