"""Accuracy over density and over MACs, with the Pareto front; and the pictures as files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from launcher.compare.configurations import Comparison, Configuration
from launcher.compare.series import series_of
from launcher.compare.table import shown
from launcher.folder.results import si
from launcher.reports.style import (
    GREY,
    INK,
    PALE,
    accuracy_axis,
    bare,
    heading,
    look_of,
    note_above,
)

DPI = 100
_FRONT: dict[str, Any] = {"color": GREY, "linewidth": 1.2, "linestyle": (0, (4, 2))}
_ACCURACY_TICKS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1)
WORDS = {"density": "density", "macs": "MACs", "milliseconds": "milliseconds", "top1": "top-1"}
# Of a legend's names, and of what stands before each and between two.
_LETTER_IN, _HANDLE_IN = 0.085, 0.6
PANEL = (5.6, 4.0)
"""Inches of one panel."""


@dataclass
class Titles:
    """What the marks of a figure are called, for a page in which they can be pointed at.

    gid of the mark → (index of its configuration, text).
    """

    texts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def put(self, artist: Artist, index: int, text: str) -> None:
        gid = f"mark-{len(self.texts)}"
        artist.set_gid(gid)
        self.texts[gid] = (index, text)


def figure_of(
    panels: int, *, width: float = PANEL[0], height: float = PANEL[1]
) -> tuple[Figure, list[Axes]]:
    """A white figure of so many panels side by side, `width` inches each."""
    figure = Figure(figsize=(panels * width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.set_facecolor("none")
    return figure, list(axes)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def accuracy(comparison: Comparison) -> Figure:
    """Accuracy over density, MACs and, where measured, milliseconds, with the legend below."""
    figure, panels = figure_of(len(comparison.costs), height=PANEL[1] + 0.3)
    for axes, cost in zip(panels, comparison.costs, strict=True):
        draw_accuracy(axes, comparison, cost)
    put_legend(figure, legend(comparison), 7)
    return figure


def columns_of(handles: Sequence[Artist], most: int, width: float) -> int:
    """How many columns, at most, a legend may have in `width` inches for its names to be whole."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    return max(1, min(most, int(width / (_LETTER_IN * longest + _HANDLE_IN))))


def put_legend(figure: Figure, handles: Sequence[Artist], most: int) -> None:
    """Below everything else, in `most` columns or as many as there is room for.

    Names are shown as they are: one may begin with _ or hold a $.
    """
    drawn = figure.legend(
        handles=handles,
        labels=["?"] * len(handles),
        loc="outside lower center",
        ncols=columns_of(handles, most, figure.get_figwidth()),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    for text, handle in zip(drawn.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(str(handle.get_label()))


def legend(comparison: Comparison) -> list[Line2D]:
    """A handle for each method, and for the front."""
    handles = [
        Line2D([], [], color=color, marker=marker, linewidth=1.2, markersize=6, label=method)
        for method, (color, marker) in looks(comparison).items()
    ]
    if any(not c.finished for c in comparison.configurations):
        hollow = {"marker": "o", "linewidth": 0, "fillstyle": "none"}
        handles.append(Line2D([], [], color=GREY, label="unfinished", **hollow))
    return [*handles, Line2D([], [], label="Pareto front", **_FRONT)]


def looks(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Method → colour and marker."""
    return look_of(list(dict.fromkeys(c.method for c in comparison.configurations)))


def draw_accuracy(
    axes: Axes, comparison: Comparison, cost: str, titles: Titles | None = None
) -> None:
    """Mean top-1 over mean `cost` (of comparison.costs), with bars of one standard deviation."""
    heading(axes, f"Top-1 accuracy over {WORDS[cost]}")
    bare(axes, grid="y")
    axes.grid(axis="x", color=PALE, linewidth=1)
    axes.set_xlabel(f"{WORDS[cost]}, logarithmic", fontsize=9.5, color=GREY, labelpad=3)
    points = [
        (index, c, x, y)
        for index, c in enumerate(comparison.configurations)
        if (x := c.mean(cost)) and (y := c.mean("top1")) is not None
    ]
    accuracy_scale(axes, [(y, _deviation(c, "top1") or 0.0) for _, c, _, y in points])
    if not points:
        axes.set_xticks([])
        return
    _log_axis(axes, [x for _, _, x, _ in points], cost)
    _draw_front(axes, comparison, cost)
    for series in series_of(c for _, c, _, _ in points if c.finished):
        color, _ = looks(comparison)[series[0].method]
        course = sorted((x, y) for _, c, x, y in points if c in series)
        axes.plot(
            [x for x, _ in course], [y for _, y in course], color=color, linewidth=1.2, alpha=0.45
        )
    for index, c, x, y in points:
        for artist in _draw_point(axes, c, (x, y), cost, *looks(comparison)[c.method]):
            if titles is not None:
                titles.put(artist, index, _title(c, cost))


def _title(c: Configuration, cost: str) -> str:
    numbers = ((WORDS[key], shown(c.stat(key), key)) for key in ("top1", cost))
    text = f"{c.name}: {', '.join(f'{word} {number}' for word, number in numbers)}"
    return f"{text} ({c.state})" if c.state else text


def _draw_point(
    axes: Axes,
    c: Configuration,
    point: tuple[float, float],
    cost: str,
    color: str,
    marker: str,
) -> list[Artist]:
    bars = axes.errorbar(
        *point,
        xerr=_bar(_deviation(c, cost), point[0]),
        yerr=_bar(_deviation(c, "top1"), math.inf),
        fmt="none",
        ecolor=color,
        elinewidth=1.1,
        capsize=2.5,
        alpha=0.8,
    )
    [mark] = axes.plot(
        *point,
        color=color,
        marker=marker,
        markersize=7.5,
        linewidth=0,
        fillstyle="full" if c.finished else "none",
        markeredgewidth=1.2,
        markeredgecolor="white" if c.finished else color,
        zorder=4,
    )
    return [mark, *bars.lines[1], *bars.lines[2]]


def _deviation(c: Configuration, key: str) -> float | None:
    stat = c.stat(key)
    return stat.std if stat else None


def _bar(std: float | None, most: float) -> list[list[float]] | None:
    """Down and up by `std`; a bar on a logarithmic axis ends before 0."""
    return None if not std else [[min(std, 0.95 * most)], [std]]


def _draw_front(axes: Axes, comparison: Comparison, cost: str) -> None:
    """As a staircase: what can be had at most for a cost, by the runs at hand."""
    front = [comparison.configurations[index] for index in comparison.front(cost)]
    points = [(x, y) for c in front if (x := c.mean(cost)) and (y := c.mean("top1")) is not None]
    if not points:
        return
    x, y = [x for x, _ in points], [y for _, y in points]
    end = axes.get_xlim()[1]
    axes.step(
        [*x, end],
        [*y, y[-1]],
        where="post",
        zorder=1,
        **_FRONT,
    )


def accuracy_scale(axes: Axes, points: list[tuple[float, float]]) -> None:
    """For (mean, deviation): linear, or logarithmic in the error where accuracies are near 100 %.

    On a linear axis one network that collapsed would press all good ones into a line.
    """
    ends = [min(max(y + sign * std, 0.0), 1.0) for y, std in points for sign in (-1, 1)]
    errors = sorted(1 - y for y, _ in points)
    if not errors or errors[0] > 0.1 or errors[-1] < 4 * max(errors[0], 1e-3):
        accuracy_axis(axes, ends)
        return
    # The axis ends at no error at all, which a logarithm has no place for.
    offset = max(errors[0] / 2, 5e-4)
    axes.set_yscale(
        "function",
        functions=(lambda y: -np.log(1 + offset - y), lambda z: 1 + offset - np.exp(-z)),
    )
    low, high = min(ends), max(ends)
    axes.set_ylim(max(0.0, low - 0.15 * (1 - low)), min(1.0, high + 0.4 * (1 - high) + offset / 5))
    bottom, top = axes.get_ylim()
    ticks = [t for t in _ACCURACY_TICKS if bottom <= t <= top]
    axes.set_yticks(ticks, [f"{100 * t:g} %" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    note_above(axes, "logarithmic in the error")


def _log_axis(axes: Axes, values: list[float], cost: str) -> None:
    axes.set_xscale("log")
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.07, 1.15)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low / margin, high * margin)))
    axes.xaxis.set_minor_locator(NullLocator())
    if cost == "density":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    elif cost == "milliseconds":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: si(x)))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between, as few steps a decade as leave at least three, at most seven."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.5)):
        ticks = [float(s * 10.0**d) for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks
