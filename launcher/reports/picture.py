"""Draws a run as one picture: accuracy and density over time, density by layer."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data.files import atomic_write
from launcher.folder.results import (
    Course,
    Layer,
    Run,
    is_number,
    latest,
    name_of,
    percent,
    read_run,
    rows_of,
    total_of,
)
from launcher.reports.style import (
    GREY,
    INK,
    accuracy_axis,
    bare,
    by_epoch,
    density_axis,
    heading,
    note_above,
    nothing_yet,
    short,
)

_ACCURACY, _TRAIN, _TRAIN_TEXT, _DENSITY = "#1769aa", "#9cc4e4", "#6ba3cf", "#d9622b"
_DPI = 100
_WIDTH_IN, _HEIGHT_IN = 14.0, 5.2
_BAR_IN = 0.155


def draw(run_dir: Path) -> Path:
    """Draw `summary.png` into the run folder: accuracy and density over time, density by layer.

    1400 × 520 pixels, taller for networks of many layers. Returns its path. Raises ReportError.
    """
    run = read_run(run_dir)
    buffer = io.BytesIO()
    _figure(run, name_of(run, run_dir)).savefig(buffer, format="png")
    path = run_dir / "summary.png"
    atomic_write(path, buffer.getvalue())
    return path


def _figure(run: Run, name: str) -> Figure:
    height = max(_HEIGHT_IN, 1.5 + (len(run.layers) + 1) * _BAR_IN)
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, run, name[:50])
    accuracy, density, bars = _panels(figure, run.layers)
    _draw_course(accuracy, density, run)
    _draw_layers(bars, run.layers)
    return figure


def _title(figure: Figure, run: Run, name: str) -> None:
    rows = rows_of(latest(run))
    facts = [f"{label} {rows[label]}" for label in ("top-1", "MACs") if label in rows]
    if "connections" in rows:
        facts.insert(1, f"{rows['connections']} connections")
    y = 1 - 0.27 / figure.get_figheight()
    # parse_math: a $ in a name is a $.
    figure.text(
        0.012,
        y,
        name,
        fontsize=14,
        fontweight="bold",
        color=INK,
        va="center",
        parse_math=False,
    )
    figure.text(0.988, y, "   ·   ".join(facts), ha="right", va="center", fontsize=11, color=INK)


def _panels(figure: Figure, layers: list[Layer]) -> tuple[Axes, Axes, Axes]:
    """The axes of accuracy and density, one above the other, and of the layers beside them."""
    height = figure.get_figheight()
    top, bottom = 1 - 0.95 / height, 0.58 / height
    middle, half_gap = (top + bottom) / 2, 0.26 / height
    accuracy = figure.add_axes((0.048, middle + half_gap, 0.412, top - middle - half_gap))
    density = figure.add_axes((0.048, bottom, 0.412, middle - half_gap - bottom))
    character = 0.0057 if _label_size(layers) > 9 else 0.0046
    names = [short(layer.name) for layer in layers]
    start = 0.505 + character * max([8, *map(len, names)])
    # The total, in bold, has the longest count; before it goes the percentage.
    end = 0.988 - character * (1.15 * max(len(_count(total_of(layers))), 17) + 9)
    bars = figure.add_axes((start, bottom, end - start, top - bottom))
    return accuracy, density, bars


def _label_size(layers: list[Layer]) -> float:
    return 10.0 if len(layers) < 20 else 8.0


def _draw_course(accuracy: Axes, density: Axes, run: Run) -> None:
    validation, training = run.series("val/top1"), by_epoch(*run.series("train/top1"))
    share = _density_course(run, validation)
    ends = [epochs[-1] for epochs, _ in (validation, training, share) if epochs]
    heading(accuracy, "Top-1 accuracy")
    heading(density, "Density: live share of all connections, logarithmic")
    _epoch_axis(accuracy, density, max(ends, default=1.0))

    _line(accuracy, training, _TRAIN, 1.5)
    _line(accuracy, validation, _ACCURACY, 2.2)
    accuracy_axis(accuracy, validation[1] + training[1])
    named = (("val", validation, _ACCURACY), ("train", training, _TRAIN_TEXT))
    labels = [
        (course, f"{word} {100 * course[1][-1]:.1f} %", color)
        for word, course, color in named
        if course[0]
    ]
    _end_labels(accuracy, labels)

    _line(density, share, _DENSITY, 2.2)
    density_axis(density, share[1])
    if share[0]:
        _end_labels(density, [(share, percent(share[1][-1]), _DENSITY)])


def _density_course(run: Run, validation: Course) -> Course:
    """The density over time; that of a dense run, which need not record it, is constant."""
    course = run.series("connections/density")
    final = run.summary.get("density")
    if course[0] or not is_number(final) or not validation[0]:
        return course
    return [0.0, validation[0][-1]], [float(final), float(final)]


def _epoch_axis(accuracy: Axes, density: Axes, last: float) -> None:
    locator = MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=last >= 2)
    ticks = [tick for tick in locator.tick_values(0, last) if 0 <= tick <= last * 1.001]
    for axes in (accuracy, density):
        bare(axes, grid="y")
        # Room on the right for the lines' own labels.
        axes.set_xlim(0, last * 1.17)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    accuracy.tick_params(labelbottom=False)
    density.set_xlabel("epoch", fontsize=9.5, color=GREY, labelpad=3)


def _line(axes: Axes, course: Course, color: str, width: float) -> None:
    epochs, values = course
    if not epochs:
        return
    marker = "o" if len(epochs) <= 3 else None
    axes.plot(
        epochs,
        values,
        color=color,
        linewidth=width,
        marker=marker,
        markersize=5,
        solid_capstyle="round",
    )


def _end_labels(axes: Axes, labels: list[tuple[Course, str, str]]) -> None:
    """Name each line at its end, pushed apart where lines end close together."""
    to_screen, to_data = axes.transData, axes.transData.inverted()
    placed = sorted(
        (to_screen.transform((course[0][-1], course[1][-1]))[1], course, text, color)
        for course, text, color in labels
    )
    apart = 17.0
    excess = 0.0
    if len(placed) == 2:
        excess = max(0.0, apart - (placed[1][0] - placed[0][0])) / 2
    for sign, (y, course, text, color) in zip((-1, 1), placed, strict=False):
        height = to_data.transform((0, y + sign * excess))[1]
        axes.annotate(
            text,
            (course[0][-1], height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=11,
            fontweight="bold",
            color=color,
            annotation_clip=False,
            # Else the grid strikes the label through.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},
        )


def _draw_layers(axes: Axes, layers: list[Layer]) -> None:
    heading(axes, "Density by layer")
    bare(axes, grid="x")
    if not layers:
        nothing_yet(axes, "no layers recorded yet")
        axes.set_xticks([])
        return
    total = total_of(layers)
    # A gap of its own sets the total off from the layers.
    positions = [*range(len(layers)), len(layers) + 0.35]
    rows = [*layers, total]
    size = _label_size(layers)
    colors = [_DENSITY] * len(layers) + [INK]
    axes.barh(positions, [row.density for row in rows], color=colors, height=0.62)
    axes.axhline(len(layers) - 0.33, color=GREY, linewidth=0.8)
    names = [short(row.name) for row in rows]
    axes.set_yticks(positions, names, fontsize=size, color=INK, parse_math=False)
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    widest = max(row.density for row in rows) or 1.0
    axes.set_xlim(0, widest)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    _row_labels(axes, rows, positions, size)


def _row_labels(axes: Axes, rows: list[Layer], positions: list[float], size: float) -> None:
    right = (0.988 - axes.get_position().x0) / axes.get_position().width
    across = axes.get_yaxis_transform()
    note_above(axes, "live / all connections", right)
    for row, y in zip(rows, positions, strict=True):
        bold = "bold" if row is rows[-1] else "normal"
        axes.annotate(
            percent(row.density),
            (row.density, y),
            xytext=(4, 0),
            color=INK,
            textcoords="offset points",
            va="center",
            fontsize=size,
            fontweight=bold,
            annotation_clip=False,
        )
        axes.text(
            right,
            y,
            _count(row),
            transform=across,
            ha="right",
            va="center",
            fontsize=size,
            color=INK,
            fontweight=bold,
        )


def _count(layer: Layer) -> str:
    return f"{layer.live:,} / {layer.connections:,}"
