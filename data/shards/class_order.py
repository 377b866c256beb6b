"""Whether samples lie in their shards sorted by class, which no window can mix well."""

from __future__ import annotations

import numpy as np

# Of 1,000 shuffled classes one neighbour in 1,000 has the same label; of sorted ones, nearly all.
SORTED_FROM = 0.5


def is_sorted_by_class(labels: np.ndarray) -> bool:
    """Whether most neighbours share a label although most samples do not."""
    if len(labels) < 2:
        return False
    share = np.bincount(labels) / len(labels)
    by_chance = float((share**2).sum())
    same = float((labels[1:] == labels[:-1]).mean())
    return same > SORTED_FROM and same > 2 * by_chance
