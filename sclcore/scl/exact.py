"""Exactly so many connections: those with the highest mask variables, wherever they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.layout.piece import Piece

_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Where each digit of a key begins, from the highest, and its bits."""


def prices_of(
    held: Holdings, share: float, weights: Mapping[str, float] | None
) -> tuple[list[float], float]:
    """(what a unit of each tensor costs, what all that live may cost), for keep_best.

    `weights` says what a connection of each tensor counts, by name (None: 1), and `share` is of
    Σ weight · connections.
    """
    counted = [1.0 if weights is None else weights[tensor.name] for tensor in held.tensors]
    prices = [count * tensor.unit for count, tensor in zip(counted, held.tensors, strict=True)]
    sizes = (count * tensor.numel for count, tensor in zip(counted, held.tensors, strict=True))
    # Half of the cheapest: what rounding to a whole number of them may be off.
    slack = min((price for price in prices if price > 0), default=0.0) / 2
    return prices, share * sum(sizes) + slack


def keep_best(held: Holdings, prices: Sequence[float], budget: float) -> None:
    """Set mask variables so that the best of them live: as many as `budget` affords.

    `prices` says what a unit of each tensor costs. Between equals the first one wins, in the order
    of the tensors and of their elements. Collective where tensors are sharded. Not for N:M, which
    decides the density itself.
    """
    keys = [keys_of(piece) for piece in held.pieces]
    bound = lowest_bound(held, keys, prices, budget)
    left = budget - _total(held, [key > bound for key in keys], prices)
    before = _earlier(held, [key == bound for key in keys], prices)
    for piece, key, first in zip(held.pieces, keys, before, strict=True):
        level, price = key == bound, prices[piece.index]
        affordable = math.floor((left - first) / price) if price else key.numel()
        chosen = (key > bound) | (level & (level.cumsum(0) <= affordable))
        _put(piece, chosen)


def keys_of(piece: Piece) -> Tensor:
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
    """What the chosen units cost, over all ranks."""
    numbers = [_owned(piece, mine).sum() for piece, mine in zip(held.pieces, chosen, strict=True)]
    return cost_of(held, numbers, prices)


def cost_of(held: Holdings, numbers: Sequence[Tensor], prices: Sequence[float]) -> float:
    """What so many units of each piece cost, over all ranks: from exact counts, alike everywhere.

    Collective where sharded.
    """
    counts = torch.zeros(len(held.tensors), dtype=torch.int64, device=held.device)
    for piece, number in zip(held.pieces, numbers, strict=True):
        counts[piece.index] = number
    if held.exchange is not None:
        dist.all_reduce(counts, group=held.exchange.group)
    return math.fsum(n * price for n, price in zip(counts.tolist(), prices, strict=True))


def lowest_bound(
    held: Holdings, keys: Sequence[Tensor], prices: Sequence[float], budget: float
) -> int:
    """The lowest of all int32 above which the keys are affordable. Collective where sharded.

    Digit by digit from the highest: how many keys have which one, and where the budget ends.
    """
    classes = sorted(set(prices))
    costs_of = torch.tensor(classes, dtype=torch.float64)[:, None]
    owned: list[list[Tensor]] = [[] for _ in classes]
    for piece, key in zip(held.pieces, keys, strict=True):
        owned[classes.index(prices[piece.index])].append(_owned(piece, key))
    # Of each price together: a network has many tensors, and few of them cost differently.
    equals = [torch.cat([held.zeros(0).int(), *parts]) for parts in owned]
    bound = 0
    for shift, bits in _DIGITS:
        digits = [_digits(key, shift, bits) for key in equals]
        counts = torch.stack([torch.bincount(each, minlength=2**bits) for each in digits])
        if held.exchange is not None:
            dist.all_reduce(counts, group=held.exchange.group)
        costs = (counts.cpu() * costs_of).sum(0)
        above = costs.flip(0).cumsum(0).flip(0) - costs
        digit = int((above <= budget).nonzero()[0])
        budget -= float(above[digit])
        bound = bound << bits | digit
        equals = [key[each == digit] for key, each in zip(equals, digits, strict=True)]
    return bound - 2**31


def _digits(keys: Tensor, shift: int, bits: int) -> Tensor:
    """A digit of each key, such that their order is the keys'."""
    digits = keys >> shift
    # The sign is part of the highest one.
    return digits + 2 ** (bits - 1) if shift + bits == 32 else digits & (2**bits - 1)


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
