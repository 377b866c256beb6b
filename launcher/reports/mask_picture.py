"""Draws how the masks of a run were learned: `masks.png`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from data.files import atomic_write
from launcher.folder.results import Run, is_number, name_of, read_run
from launcher.reports.style import GREY, INK, bare, heading, nothing_yet, short
from sclcore.telemetry import HISTOGRAM_EDGES

_BEFORE, _AFTER, _FLIPS, _REVIVALS = "#d55e00", "#0072b2", "#009e73", "#e69f00"
_PREFIX = "density/"


def draw(run_dir: Path) -> Path | None:
    """Draw `masks.png` into the run folder and return its path; None for a run without masks.

    Density of each layer over time; where masks are learned also their variables, the imbalance of
    the features' gradients and how many masks flip. Raises ReportError.
    """
    run = read_run(run_dir)
    evaluations = [line for line in run.metrics if is_number(line.get("val/top1"))]
    layers = [k for k in (evaluations[-1] if evaluations else {}) if k.startswith(_PREFIX)]
    if not layers:
        return None
    panels: list[Callable[[Axes, Run], None]] = []
    if any("masks/histogram" in line for line in evaluations):
        panels += [_variables, _imbalance]
    panels.append(_flips)
    height = max(6.0 if len(panels) > 1 else 4.0, 1.6 + 0.17 * len(layers))
    figure = Figure(figsize=(14, height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{name_of(run, run_dir)[:50]}: how its connections were found",
        x=0.012,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=INK,
        parse_math=False,
    )
    grid = figure.add_gridspec(len(panels), 2, width_ratios=(1.15, 1))
    _heat_map(figure.add_subplot(grid[:, 0]), evaluations, layers)
    for row, panel in enumerate(panels):
        panel(figure.add_subplot(grid[row, 1]), run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = run_dir / "masks.png"
    atomic_write(path, buffer.getvalue())
    return path


def _heat_map(axes: Axes, evaluations: list[dict[str, Any]], layers: list[str]) -> None:
    heading(axes, "Density of each layer over the epochs")
    values = np.array([[line.get(k) or np.nan for line in evaluations] for k in layers])
    # A decade at least, so that what hardly changes looks like it.
    low = min(0.1, float(np.nanmin(values, initial=0.1)))
    edges = _edges_of(evaluations)
    image = axes.pcolormesh(
        edges, np.arange(len(layers) + 1), values, norm=LogNorm(low, 1.0), cmap="viridis"
    )
    axes.invert_yaxis()
    size = 9.5 if len(layers) < 30 else 7.0
    names = [short(key.removeprefix(_PREFIX)) for key in layers]
    axes.set_yticks(np.arange(len(layers)) + 0.5, names, fontsize=size, color=INK, parse_math=False)
    axes.tick_params(length=0, labelcolor=GREY)
    axes.set_xlabel("epoch", fontsize=9.5, color=GREY)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()


def _edges_of(evaluations: list[dict[str, Any]]) -> np.ndarray:
    """Where the cell of each evaluation begins and ends: from the one before to its own."""
    ends = [float(line["epoch"]) for line in evaluations]
    first = ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1.0)
    return np.array([first, *ends])


def _variables(axes: Axes, run: Run) -> None:
    heading(axes, "Mask variables m; below the line, connections are dead")
    lines = [line for line in run.metrics if line.get("masks/histogram")]
    counts = np.array([line["masks/histogram"] for line in lines], dtype=float).T
    shares = counts / np.maximum(1.0, counts.sum(0))
    shares[shares == 0] = np.nan
    norm = LogNorm(1e-4, 1.0)
    image = axes.pcolormesh(_edges_of(lines), HISTOGRAM_EDGES, shares, norm=norm, cmap="magma_r")
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["≤ −1", "−0.5", "0", "0.5", "≥ 1"])
    bare(axes, grid="y")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()


def _imbalance(axes: Axes, run: Run) -> None:
    heading(axes, "Imbalance of features: largest ÷ median rms of mask gradients")
    _lines(axes, run, {"masks/imbalance_before": ("before normalisation", _BEFORE)})
    _lines(axes, run, {"masks/imbalance_after": ("after normalisation", _AFTER)})
    if not any(value > 0 for value in run.series("masks/imbalance_before")[1]):
        # Masks that were fixed from the start have no gradient.
        nothing_yet(axes, "no mask gradient recorded")
        return
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    _legend(axes)


def _flips(axes: Axes, run: Run) -> None:
    heading(axes, "Masks that changed since the line before")
    _lines(axes, run, {"masks/flips": ("all", _FLIPS)})
    _lines(axes, run, {"masks/revivals": ("came to life", _REVIVALS)})
    axes.set_yscale("symlog", linthresh=10)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set_xlabel("epoch", fontsize=9.5, color=GREY)
    _legend(axes)


def _lines(axes: Axes, run: Run, named: dict[str, tuple[str, str]]) -> None:
    for key, (label, color) in named.items():
        epochs, values = run.series(key)
        axes.plot(epochs, values, color=color, linewidth=1.4, label=label)
    bare(axes, grid="y")
    ends = [float(line["epoch"]) for line in run.metrics if is_number(line.get("epoch"))]
    axes.set_xlim(0, max(ends, default=1.0))


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper right", fontsize=9, frameon=False, labelcolor=GREY)
