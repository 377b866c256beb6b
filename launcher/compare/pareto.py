"""The Pareto front: what no other run beats at equal or lower cost."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, value) on the front, by rising cost.

    Lower cost and higher value are better. A point is off the front if another is at least as good
    in both and better in one; equal points are all on it. The points must be finite.
    """
    front: list[int] = []
    best = float("-inf")
    # Among points of equal cost the best comes first, so that it alone sets `best`.
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        value = points[index][1]
        duplicate = bool(front) and points[front[-1]] == points[index]
        if value > best or duplicate:
            front.append(index)
            best = value
    return front
