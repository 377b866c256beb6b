"""How many connections each layer gets, where a method shares a density out beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The density of each layer: in proportion to Σ shape / Π shape, at most 1, `density` overall.

    Small layers would come out above 1; they are dense, and the others share what is left. Source:
    the Erdős–Rényi kernel of Evci et al., arXiv 1911.11134, section 3 (1).
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(sizes)) if i not in dense]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in sparse) if sparse else 0.0
        full = max((raw[i] for i in sparse), default=0.0)
        if scale * full <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        dense |= {i for i in sparse if raw[i] == full}


def erk_counts(shapes: Sequence[Sequence[int]], density: float) -> list[int]:
    """Whole numbers of connections near ERK's densities, whose sum is exact; 1 at least."""
    return _whole(shapes, erk_densities(shapes, density), density)


def layer_counts(shapes: Sequence[Sequence[int]], density: float) -> list[int]:
    """The same where every layer has the density of the network."""
    return _whole(shapes, [density] * len(shapes), density)


def _whole(
    shapes: Sequence[Sequence[int]], densities: Sequence[float], density: float
) -> list[int]:
    sizes = [math.prod(shape) for shape in shapes]
    wanted = [d * n for d, n in zip(densities, sizes, strict=True)]
    counts = [max(1, math.floor(number)) for number in wanted]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    for i in by_fraction[: max(0, round(density * sum(sizes)) - sum(counts))]:
        counts[i] = min(sizes[i], counts[i] + 1)
    return counts
