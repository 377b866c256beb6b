"""Draws the floors of the house: every room, what lives there, and which rooms it imports from.

    python -m docs.figures.house --out docs/figures/house.png

Read from the imports of the files; `tests/test_house.py` holds that none of them goes up.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from tests.house import FLOORS, ROOT, modules_of, room_of

_COLOURS = {"launcher": "#dbe7f3", "data": "#e3f0dc", "sclcore": "#f6e6d3"}
_GREY = "#5f6670"
_HEIGHT = 0.82
# Everybody may say something to the user; arrows to these would hide the others.
_UNSAID = {"errors", "terminal", "files"}


def purpose(package: str, room: str) -> str:
    """The first line of what a room says of itself."""
    folder = ROOT / package / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].replace("`", "").rstrip(".")


def lines(package: str, room: str) -> int:
    folder = ROOT / package / room
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def below(package: str, room: str) -> list[str]:
    """The rooms that `room` imports from, in the order of the floors, the highest first."""
    modules = modules_of(ROOT, package)
    used = {
        room_of(other)
        for module, others in modules.items()
        if room_of(module) == room
        for other in others
    }
    return [name for name in reversed(FLOORS[package]) if name in used - {room} - _UNSAID]


def draw_building(axes: Axes, package: str, ground: float, left: float, width: float) -> float:
    """One package, floor on floor from `ground` up; returns the height of its roof."""
    for floor, room in enumerate(FLOORS[package]):
        bottom = ground + floor
        box = FancyBboxPatch(
            (left, bottom),
            width,
            _HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=_COLOURS[package],
            edgecolor="white",
        )
        axes.add_patch(box)
        middle = bottom + _HEIGHT / 2
        axes.text(left + 0.15, middle, room, va="center", weight="bold", fontsize=9)
        axes.text(left + 1.5, middle + 0.17, purpose(package, room), va="center", fontsize=7.5)
        uses = ", ".join(below(package, room))
        under = f"{lines(package, room):,} lines" + (f" · imports {uses}" if uses else "")
        axes.text(left + 1.5, middle - 0.2, under, va="center", fontsize=6.8, color=_GREY)
    roof = ground + len(FLOORS[package])
    axes.text(left, roof + 0.12, f"{package}/", weight="bold", fontsize=12)
    return roof


def draw(path: Path) -> None:
    figure = Figure(figsize=(15, 13), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    launcher_roof = draw_building(axes, "launcher", 0, 0, 7.6)
    data_roof = draw_building(axes, "data", 0, 8, 7.6)
    roof = draw_building(axes, "sclcore", data_roof + 1.2, 8, 7.6)
    axes.text(
        0,
        launcher_roof + 1.3,
        "A room imports from the rooms below it. launcher/ imports from data/ and sclcore/;\n"
        "these two know neither it nor each other.",
        fontsize=9,
        color=_GREY,
    )
    axes.set_xlim(-0.1, 15.6)
    axes.set_ylim(-0.1, roof + 0.8)
    axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/house.png"))
    options = parser.parse_args()
    draw(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
