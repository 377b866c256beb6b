"""Exactly so many connections: those with the highest mask variables, wherever they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.layout.piece import Piece

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def keep_best(held: Holdings, budget: float, weights: Mapping[str, float]) -> None:
    """Set mask variables so that the best of them live: as many as come nearest to `budget`.

    `weights` says what a connection of each tensor counts, by name, and `budget` how much may live
    in all. Between equals the first one wins, in the order of the tensors and of their elements.
    Collective where tensors are sharded. Not for N:M, which decides the density itself.
    """
    prices = [weights[tensor.name] * tensor.unit for tensor in held.tensors]
    # Half of the cheapest: what rounding to a whole number of them may be off.
    budget += min((price for price in prices if price > 0), default=0.0) / 2
    keys = [_keys(piece) for piece in held.pieces]
    bound = _lowest_bound(held, keys, prices, budget)
    left = budget - _total(held, [key > bound for key in keys], prices)
    before = _earlier(held, [key == bound for key in keys], prices)
    for piece, key, first in zip(held.pieces, keys, before, strict=True):
        level, price = key == bound, prices[piece.index]
        affordable = math.floor((left - first) / price) if price else key.numel()
        chosen = (key > bound) | (level & (level.cumsum(0) <= affordable))
        _put(piece, chosen)


def _keys(piece: Piece) -> Tensor:
    """The mask variable of each unit of a piece [units] as int32, in the order of the values."""
    unit = piece.tensor.unit
    firsts = piece.first_of_units().to(piece.mask.device) if unit > 1 else slice(None)
    values = piece.mask[firsts]
    # A float's bits are in its order where it is positive, and in the opposite one where not.
    bits = (values.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _owned(piece: Piece, chosen: Tensor) -> Tensor:
    """`chosen` without a unit that begins on another rank: that one counts it."""
    return chosen[1:] if piece.start % piece.tensor.unit else chosen


def _total(held: Holdings, chosen: Sequence[Tensor], prices: Sequence[float]) -> float:
    """What the chosen units cost, over all ranks: from exact counts, alike everywhere."""
    counts = torch.zeros(len(held.tensors), dtype=torch.int64, device=held.device)
    for piece, mine in zip(held.pieces, chosen, strict=True):
        counts[piece.index] = _owned(piece, mine).sum()
    if held.exchange is not None:
        dist.all_reduce(counts, group=held.exchange.group)
    return math.fsum(n * price for n, price in zip(counts.tolist(), prices, strict=True))


def _lowest_bound(
    held: Holdings, keys: Sequence[Tensor], prices: Sequence[float], budget: float
) -> int:
    """The lowest key above which everything is affordable, by bisection."""
    low, high = _LOWEST, _HIGHEST
    while low < high:
        middle = (low + high) // 2
        if _total(held, [key > middle for key in keys], prices) <= budget:
            high = middle
        else:
            low = middle + 1
    return low


def _earlier(held: Holdings, level: Sequence[Tensor], prices: Sequence[float]) -> list[float]:
    """What the equals before each piece cost, in the order of tensors and elements."""
    mine = [
        (piece.index, piece.start, int(_owned(piece, equals).sum()))
        for piece, equals in zip(held.pieces, level, strict=True)
    ]
    everyone = mine
    if held.exchange is not None:
        parts: list[list[tuple[int, int, int]]] = [
            [] for _ in range(dist.get_world_size(held.exchange.group))
        ]
        dist.all_gather_object(parts, mine, group=held.exchange.group)
        everyone = [part for of_rank in parts for part in of_rank]
    return [
        math.fsum(
            n * prices[index]
            for index, start, n in everyone
            if (index, start) < (piece.index, piece.start)
        )
        # A unit that began on the rank before has been counted there.
        - prices[piece.index] * (piece.start % piece.tensor.unit > 0 and bool(equals[:1].any()))
        for piece, equals in zip(held.pieces, level, strict=True)
    ]


def _put(piece: Piece, chosen: Tensor) -> None:
    """Raise what was chosen above 0, as little as can be, and bring the rest down to it."""
    unit, mask = piece.tensor.unit, piece.mask
    on = chosen if unit == 1 else piece.spread(chosen, unit)
    least = torch.finfo(mask.dtype).tiny
    mask.copy_(torch.where(on, mask.clamp(min=least), mask.clamp(max=0.0)))
