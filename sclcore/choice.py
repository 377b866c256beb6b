"""Which of many to keep: exact counts, and the same choice everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` elements of a vector are the largest, as a bool vector; ties: the first ones.

    Written out because what topk does with ties depends on the device and on the version.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(len(scores) - count + 1).values
    above, level = scores > bound, scores == bound
    return above | (level & (level.cumsum(0) <= count - above.sum()))


def largest_of_all(scores: list[Tensor], count: int) -> list[Tensor]:
    """The same over several vectors together."""
    chosen = largest(torch.cat(scores), count)
    return list(chosen.split([len(score) for score in scores]))


def best_of_blocks(rows: Tensor, count: int) -> Tensor:
    """Which `count` elements of each row [n, m] are the largest, as bools; ties: the first ones."""
    order = rows.argsort(dim=1, descending=True, stable=True)
    best = torch.zeros_like(rows, dtype=torch.bool)
    return best.scatter_(1, order[:, :count], True)
