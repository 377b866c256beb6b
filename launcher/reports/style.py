"""What all pictures of runs have in common: colours, headings, axes of accuracy and of density."""

from __future__ import annotations

import math
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from launcher.folder.results import Course
from sclcore.registry import known_methods

INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"


def heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK, pad=7)


def note_above(axes: Axes, text: str, right: float = 1.0) -> None:
    """Opposite the heading, in small print; it ends at `right`, a share of the axes' width."""
    axes.annotate(
        text,
        (right, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=GREY,
    )


def bare(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=GREY)
    axes.grid(axis=grid, color=PALE, linewidth=1)
    axes.set_axisbelow(True)


def by_epoch(epochs: list[float], values: list[float]) -> Course:
    """Means over whole epochs, at their ends: what single batches say is mostly noise."""
    if not epochs or epochs[-1] < 2:
        return epochs, values
    bins: dict[float, list[float]] = {}
    for epoch, value in zip(epochs, values, strict=True):
        bins.setdefault(min(float(math.ceil(epoch)), epochs[-1]), []).append(value)
    bins.pop(0.0, None)
    return list(bins), [sum(group) / len(group) for group in bins.values()]


def accuracy_axis(axes: Axes, values: list[float]) -> None:
    if not values:
        nothing_yet(axes, "no accuracy recorded yet")
        return
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.01)
    axes.set_ylim(max(0.0, low - margin), min(1.0, high + margin) + 0.02 * (high - low))
    bottom, top = axes.get_ylim()
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(bottom, top)
    axes.set_yticks([tick for tick in ticks if bottom <= tick <= min(top, 1)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))


def density_axis(axes: Axes, values: list[float]) -> None:
    positive = [value for value in values if value > 0]
    if not positive:
        nothing_yet(axes, "no density recorded yet")
        return
    axes.set_yscale("log")
    # A decade at least, so that a flat line at 100 % looks like one.
    low = min(0.1, *positive)
    axes.set_ylim(low / 1.35, 1.18)
    steps = (1,) if low < 0.003 else (1, 3) if low < 0.08 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(-9, 1) for step in steps]
    axes.set_yticks([tick for tick in ticks if low / 1.3 <= tick <= 1])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))


def nothing_yet(axes: Axes, text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY, fontsize=11)


def short(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= 34 else f"{name[:17]}…{name[-16:]}"


# Okabe and Ito's colours, which the colour-blind tell apart; the markers differ as well.
# Those of a method are in its class.
_OTHERS = (("#332288", "h"), ("#999933", "8"), (GREY, "*"))


def look_of(methods: list[str]) -> dict[str, tuple[str, str]]:
    """Method → its colour and marker, the same in every picture; unknown ones get the spare."""
    own = {name: kind.look for name, kind in known_methods().items() if kind.look}
    unknown = [method for method in methods if method not in own]
    spare = {method: _OTHERS[index % len(_OTHERS)] for index, method in enumerate(unknown)}
    return {method: own.get(method) or spare[method] for method in methods}
