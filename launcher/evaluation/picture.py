"""The pictures of an evaluation: reliability, the change of each class, who is taken for whom."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from launcher.evaluation.measures import confusion_matrix
from launcher.reports.style import GREY, INK, PALE, bare, heading, look_of, short

# More bars than this cannot be told apart; the table and the file have all classes.
_BARS = 24
# So many classes can be named in a confusion matrix, and so many can have numbers in its fields.
_NAMED, _COUNTED = 80, 24


def draw(report: dict[str, Any]) -> bytes:
    """PNG of a report of `launcher.evaluation.report`."""
    return _png(figure_of(report))


def draw_confusion(report: dict[str, Any]) -> bytes:
    """PNG of the confusion matrix of a report."""
    return _png(confusion_figure(report))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def confusion_figure(report: dict[str, Any]) -> Figure:
    """Which class is taken for which: the share of each class's samples, row by row."""
    results = report["results"]
    matrix = confusion_matrix(results)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(matrix)
    side = min(12.0, 3.5 + 0.22 * count)
    figure = Figure(figsize=(side + 1.2, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    heading(axes, "Which class is taken for which")
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the class", color=GREY)
    axes.set_xlabel("predicted", color=GREY)
    axes.set_ylabel("class", color=GREY)
    axes.tick_params(length=0, labelcolor=GREY)
    if count > _NAMED:
        # Nobody could read so many names.
        axes.set_xticks([])
        axes.set_yticks([])
        return figure
    names = [short(row["class"]) for row in results["classes"]]
    size = 9 if count <= 24 else 6
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    if count <= _COUNTED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.6 else INK
            text = f"{matrix[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    return figure


def figure_of(report: dict[str, Any]) -> Figure:
    against = report.get("against")
    figure = Figure(figsize=(11 if against else 5.6, 5), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2 if against else 1, squeeze=False)[0]
    _reliability(panels[0], report)
    if against:
        _by_class(panels[1], against)
    return figure


def _reliability(axes: Axes, report: dict[str, Any]) -> None:
    """Accuracy against confidence; the size of a dot says how many samples a bin has."""
    heading(axes, "Reliability: how often a confident answer is right")
    bare(axes, grid="y")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    looks = look_of(["scl", "dense"])
    shown = [(report["run"], report["results"], looks["scl"])]
    if against := report.get("against"):
        shown.insert(0, (against["run"], against["results"], looks["dense"]))
    for name, results, (colour, marker) in shown:
        bins = results["calibration"]
        x, y = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
        ece = 100 * (results["ece"] or 0)
        label = f"{short(name)}, error {ece:.2f} %"
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.5, label=label)
        areas = [max(12.0, 400 * b["samples"] / results["samples"]) for b in bins]
        axes.scatter(x, y, s=areas, color=colour, marker=marker, alpha=0.7, linewidths=0)
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("confidence", color=GREY)
    axes.set_ylabel("accuracy", color=GREY)
    axes.legend(frameon=False, loc="lower right", labelcolor=INK)


def _by_class(axes: Axes, against: dict[str, Any]) -> None:
    rows = against["classes"]
    if len(rows) > _BARS:
        rows = rows[: _BARS // 2] + rows[-(_BARS // 2) :]
    heading(axes, "Change of each class against the dense network, points")
    bare(axes, grid="x")
    places = range(len(rows))
    colours = [INK if row["significant"] else GREY for row in rows]
    axes.barh(places, [100 * row["change"] for row in rows], color=colours, height=0.7)
    axes.axvline(0, color=PALE, linewidth=1)
    axes.set_yticks([*places], [short(row["class"]) for row in rows])
    axes.invert_yaxis()
    note = "dark: holds at a false discovery rate of 5 %"
    left_out = len(against["classes"]) - len(rows)
    if left_out:
        note += f"\n{left_out:,} classes between are left out"
    # Where names of classes are long, the axes are narrower than the note: it may begin below them.
    axes.set_xlabel(note, color=GREY, loc="right")
