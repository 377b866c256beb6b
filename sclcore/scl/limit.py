"""No more than so many connections: mask variables lowered together by as much as that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.options import Options
from sclcore.kernels.reference import live, round_at_random, write
from sclcore.layout.piece import Piece
from sclcore.scl.exact import keys_of, lowest_bound, prices_of

_NOISE = 0x2C1B3C6D


@dataclass(frozen=True)
class Limit:
    """The share of Σ weight · connections that may live; `weights` by name (None: 1 each)."""

    share: float
    weights: Mapping[str, float] | None = None


def lower(
    held: Holdings, limit: Limit, before: Sequence[Tensor], options: Sequence[Options]
) -> float:
    """How far all mask variables were lowered; 0 where no more live than may.

    After a step in which none began anew. `before` says of each piece what was live ahead of it:
    what has come to life since, and still lives, begins anew here, at `mask_restart`. So a
    connection that rises displaces another only where its mask variable is the higher one, and all
    that are left keep their distances. Parameters are written, and what was counted is counted
    again. Collective where tensors are sharded.
    """
    distance = _distance(held, limit)
    counted: dict[int, Tensor] = {}
    for i, (piece, was, each) in enumerate(zip(held.pieces, before, options, strict=True)):
        if distance:
            _lower(piece, distance, each)
        after = live(piece)
        revived = after & ~was
        if each.mask_restart:
            piece.mask.masked_fill_(revived, each.mask_restart)
            piece.mask_momentum.masked_fill_(revived, 0.0)
        write(piece, after)
        parts = (after, after != was, revived)
        counted[i] = torch.stack([torch.count_nonzero(part) for part in parts])
    held.note(counted, moved=[*range(len(held.pieces))])
    return distance


def _distance(held: Holdings, limit: Limit) -> float:
    """The highest mask variable that may not live; 0 where none that is above 0 is too much."""
    if limit.share >= 1:
        # A course begins so, and there is nothing to look for.
        return 0.0
    prices, budget = prices_of(held, limit.share, limit.weights)
    keys = [keys_of(piece).clamp(min=0) for piece in held.pieces]
    bound = max(0, lowest_bound(held, keys, prices, budget))
    return float(torch.tensor(bound, dtype=torch.int32).view(torch.float32))


def _lower(piece: Piece, distance: float, options: Options) -> None:
    if piece.mask.dtype == torch.bfloat16:
        lowered = round_at_random(piece.mask.float() - distance, piece, options.noise ^ _NOISE)
        piece.mask.copy_(lowered)
    else:
        piece.mask.sub_(distance)
