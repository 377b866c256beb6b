"""How many features a budget leaves: those with the largest gates, found by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sclcore.choice import largest, largest_of_all
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.gates import Gates


def keep_largest(gates: Gates, count: int) -> dict[str, Tensor]:
    """Which gates are the `count` largest of all layers, as 1 and 0; each layer keeps one."""
    scores = [gate.masked_fill(largest(gate, 1), torch.inf) for gate in gates.values()]
    kept = largest_of_all(scores, max(count, len(scores)))
    return {
        name: chosen.to(gate.dtype)
        for (name, gate), chosen in zip(gates.items(), kept, strict=True)
    }


def within_budget(gates: Gates, cost: Callable[[Gates], float], budget: float) -> dict[str, Tensor]:
    """The most features, by the size of their gates, that cost no more than `budget`.

    `cost` must not fall when a feature is added. Bisection over their number, to the last one:
    source: Wang et al., arXiv 1909.12579, who stop at a tolerance.
    """
    low, high = len(gates), sum(len(gate) for gate in gates.values())
    while low < high:
        middle = (low + high + 1) // 2
        if cost(keep_largest(gates, middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return keep_largest(gates, low)
