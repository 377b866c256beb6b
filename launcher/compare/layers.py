"""Density per layer, side by side: bars for a few configurations, a map of numbers for more."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from launcher.compare.configurations import Comparison, Configuration
from launcher.compare.courses import strengths_of
from launcher.compare.figures import PANEL, Titles, figure_of, looks, put_legend
from launcher.folder.results import percent
from launcher.reports.style import INK, bare, heading, note_above, nothing_yet, short

# With more configurations or layers, bars cannot be told apart.
_MOST_BARS, _MOST_GROUPS = 3, 10
_CELL_IN = 0.24
_NARROWEST_NUMBER_IN = 0.42
_COLORS = "YlGnBu"
# On a coloured cell: not the page's ink, which is pale on a dark page.
_ON_PALE, _ON_DARK = "#101418", "#fdfdfd"

Shown = list[tuple[int, Configuration, dict[str, float]]]


def layers(comparison: Comparison, titles: Titles | None = None) -> Figure:
    """A figure of two panels' width, as high as the layers need."""
    shown = sparse(comparison)
    names = layer_names(shown)
    bars = len(shown) <= _MOST_BARS and len(names) <= _MOST_GROUPS
    cell = _CELL_IN if len(names) <= 30 else 0.8 * _CELL_IN
    row = 0.17 * len(shown) + 0.16 if bars else cell
    figure, [axes] = figure_of(1, height=max(2.2, 1.3 + row * len(names)))
    figure.set_figwidth(2 * PANEL[0])
    heading(axes, "Density per layer")
    if not shown:
        bare(axes, grid="x")
        nothing_yet(axes, "every layer is dense")
        axes.set_xticks([])
        return figure
    (_draw_bars if bars else _draw_map)(axes, comparison, shown, names, titles)
    axes.set_yticks(range(len(names)), list(map(short, names)), color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.45, -0.55)
    return figure


def sparse(comparison: Comparison) -> Shown:
    """Index, configuration and its densities, without those that kept every connection."""
    every = [(i, c, c.densities()) for i, c in enumerate(comparison.configurations)]
    return [
        (i, c, densities) for i, c, densities in every if min(densities.values(), default=1) < 1
    ]


def layer_names(shown: Shown) -> list[str]:
    """All layers, in the order of the network."""
    return list(dict.fromkeys(name for _, _, densities in shown for name in densities))


def _draw_bars(
    axes: Axes, comparison: Comparison, shown: Shown, names: list[str], titles: Titles | None
) -> None:
    bare(axes, grid="x")
    strengths, colors = strengths_of(comparison), looks(comparison)
    height = 0.74 / len(shown)
    for place, (index, c, densities) in enumerate(shown):
        offset = (place - (len(shown) - 1) / 2) * height
        for y, name in enumerate(names):
            if name not in densities:
                continue
            density = densities[name]
            [bar] = axes.barh(
                y + offset,
                density,
                height=0.9 * height,
                color=colors[c.method][0],
                alpha=strengths[index],
            )
            axes.annotate(
                percent(density),
                (density, y + offset),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
            if titles is not None:
                titles.put(bar, index, f"{c.name}, {short(name)}: {percent(density)}")
    widest = max(max(densities.values()) for _, _, densities in shown)
    axes.set_xlim(0, 1.09 * widest)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    handles = [
        Rectangle((0, 0), 1, 1, color=colors[c.method][0], alpha=strengths[index], label=c.name)
        for index, c, _ in shown
    ]
    figure = axes.get_figure(root=True)
    assert figure is not None
    put_legend(figure, handles, _MOST_BARS)


def _draw_map(
    axes: Axes, comparison: Comparison, shown: Shown, names: list[str], titles: Titles | None
) -> None:
    """Rows are layers, columns configurations; the darker, the denser, logarithmically."""
    bare(axes, grid="x")
    axes.grid(visible=False)
    positive = [d for _, _, densities in shown for d in densities.values() if d > 0]
    norm = LogNorm(min(positive, default=0.01) / 1.2, 1.0)
    numbers = 0.8 * 2 * PANEL[0] / len(shown) >= _NARROWEST_NUMBER_IN
    for x, (index, c, densities) in enumerate(shown):
        for y, name in enumerate(names):
            if name not in densities:
                continue
            shade = float(norm(max(densities[name], norm.vmin or 0.0)))
            cell = Rectangle(
                (x - 0.49, y - 0.47), 0.98, 0.94, facecolor=colormaps[_COLORS](0.9 * shade)
            )
            cell.set_in_layout(False)
            axes.add_patch(cell)
            if titles is not None:
                titles.put(cell, index, f"{c.name}, {short(name)}: {percent(densities[name])}")
            if numbers:
                number = axes.text(
                    x,
                    y,
                    percent(densities[name]),
                    ha="center",
                    va="center_baseline",
                    fontsize=8,
                    color=_ON_DARK if shade > 0.6 else _ON_PALE,
                )
                # It lies within its cell; to measure thousands of them takes seconds.
                number.set_in_layout(False)
    labels = [c.name if len(c.name) <= 28 else f"{c.name[:14]}…{c.name[-13:]}" for _, c, _ in shown]
    turned = max(map(len, labels)) * len(labels) > 120
    axes.set_xticks(
        np.arange(len(shown)),
        labels,
        rotation=35 if turned else 0,
        ha="right" if turned else "center",
        color=INK,
        parse_math=False,
    )
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.tick_params(axis="y", labelcolor=INK)
    note_above(axes, "the darker, the denser")
