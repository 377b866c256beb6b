"""The most features that fit a budget, against trying every number of them."""

from __future__ import annotations

import pytest
import torch

from sclcore.driver.budget_search import keep_largest, within_budget
from sclcore.driver.gates import Gates

GATES = {
    "a": torch.tensor([0.9, 0.1, 0.8, 0.0]),
    "b": torch.tensor([0.05, 0.02]),
    "c": torch.tensor([0.5, 0.6, 0.0, 0.0, 0.3]),
}


def test_the_largest_stay_and_one_of_each_layer() -> None:
    kept = keep_largest(GATES, 4)
    assert {name: gate.tolist() for name, gate in kept.items()} == {
        "a": [1, 0, 1, 0],
        "b": [1, 0],
        "c": [0, 1, 0, 0, 0],
    }
    assert all(gate.sum() == 1 for gate in keep_largest(GATES, 0).values())
    assert sum(int(gate.sum()) for gate in keep_largest(GATES, 99).values()) == 11


def product(gates: Gates) -> float:
    """Connections of a chain of layers, which are no sum over features."""
    a, b, c = (float(gate.sum()) for gate in gates.values())
    return 3 * a + a * b + b * c + 2 * c


@pytest.mark.parametrize("budget", [9.0, 10.0, 17.5, 25.0, 30.0, 39.9, 40.0, 99.0])
def test_no_more_features_would_fit(budget: float) -> None:
    costs = [product(keep_largest(GATES, count)) for count in range(3, 12)]
    best = max((cost for cost in costs if cost <= budget), default=costs[0])
    assert product(within_budget(GATES, product, budget)) == best
