"""What the lines of `benchmarks.front` say: means, and differences split by split."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.front_lines import Line

_OURS = "scl"
# As good as the same density.
_NEAR = 1.1


def is_ours(name: str) -> bool:
    """Whether these are results of SCL, or of a variant of it."""
    return name.split()[0] == _OURS


def _newest(lines: list[Line]) -> Iterable[Line]:
    """Of lines that differ in nothing but their settings, the last."""
    return {(line.name, line.asked, line.split): line for line in lines}.values()


def differences(ours: list[Line], theirs: list[Line]) -> np.ndarray:
    """Our top-1 less theirs at our density, of the splits that both have."""
    by_split: dict[int, list[Line]] = defaultdict(list)
    for line in theirs:
        by_split[line.split].append(line)
    found = [_read_off(by_split[line.split], line.density) for line in ours]
    pairs = [(line.top1, other) for line, other in zip(ours, found, strict=True) if other >= 0]
    return np.array([mine - other for mine, other in pairs])


def _read_off(lines: list[Line], at: float) -> float:
    """Top-1 at the density `at`; NaN where no line is near."""
    points = sorted((line.density, line.top1) for line in lines)
    if not points:
        return math.nan
    first, last = points[0][0], points[-1][0]
    if not first / _NEAR <= at <= last * _NEAR:
        return math.nan
    known, top1s = zip(*points, strict=True)
    return float(np.interp(math.log(at), np.log(known), top1s))


def compared(lines: list[Line]) -> dict[str, Any]:
    """For each density and each of our names: means, and differences from every rival."""
    by_name: dict[str, list[Line]] = defaultdict(list)
    for line in _newest(lines):
        by_name[line.name].append(line)
    result: dict[str, Any] = {}
    for asked in sorted({line.asked for line in lines if line.asked < 1}, reverse=True):
        of_density: dict[str, Any] = {}
        for name in (n for n in by_name if is_ours(n)):
            ours = [line for line in by_name[name] if line.asked == asked]
            if not ours:
                continue
            rivals = {
                other: spread(differences(ours, theirs if other != "dense" else _flat(theirs)))
                for other, theirs in by_name.items()
                if not is_ours(other)
            }
            of_density[name] = {
                "top1": spread(np.array([line.top1 for line in ours])),
                "density": round(100 * float(np.mean([line.density for line in ours])), 3),
                "less": {other: gap for other, gap in rivals.items() if gap},
            }
        result[f"{100 * asked:g} %"] = of_density
    return result


def _flat(lines: list[Line]) -> list[Line]:
    """The dense network as a rival at every density."""
    return [dataclasses.replace(line, density=d) for line in lines for d in (1e-6, 1.0)]


def spread(values: np.ndarray) -> dict[str, Any] | None:
    """Mean and standard error in points, and number, of shares; None where there are none."""
    if not len(values):
        return None
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return {
        "points": round(100 * float(values.mean()), 3),
        "error": round(100 * float(error), 3) if len(values) > 1 else None,
        "runs": len(values),
    }


def means(lines: list[Line]) -> str:
    """A table of what there is: top-1 and density of each name by the density asked for."""
    groups: dict[tuple[str, float], list[Line]] = defaultdict(list)
    for line in _newest(lines):
        groups[line.name, line.asked].append(line)
    rows = []
    for (name, asked), of_group in sorted(groups.items(), key=lambda g: (-g[0][1], g[0][0])):
        found = spread(np.array([line.top1 for line in of_group]))
        assert found is not None
        rows.append(
            [
                name,
                f"{100 * asked:g} %",
                shown(found),
                f"{100 * np.mean([line.density for line in of_group]):.2f} %",
                str(len(of_group)),
                f"{np.mean([line.seconds for line in of_group]):.1f} s",
            ]
        )
    return table(["name", "asked", "top-1", "density", "runs", "each"], rows)


def shown(found: dict[str, Any]) -> str:
    """Mean ± standard error of what `spread` found."""
    error = "" if found["error"] is None else f" ± {found['error']:.2f}"
    return f"{found['points']:.2f}{error} %"
