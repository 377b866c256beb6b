"""No more than so many connections: mask variables lowered together by as much as that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels import reference
from sclcore.kernels.find import find_kernel
from sclcore.kernels.kernel import Lowering, is_plain
from sclcore.kernels.options import Options
from sclcore.scl.exact import cost_of, keys_of, lowest_bound, prices_of
from sclcore.scl.step import share_out

# So many times as far as last is looked first, and then, before everywhere.
_NEAR = (2.0, 16.0)


@dataclass(frozen=True)
class Limit:
    """The share of Σ weight · connections that may live; `weights` by name (None: 1 each)."""

    share: float
    weights: Mapping[str, float] | None = None


def lower(
    held: Holdings,
    limit: Limit,
    before: Sequence[Tensor],
    options: Sequence[Options],
    last: float | None = None,
) -> float:
    """How far all mask variables were lowered; 0 where no more live than may.

    After a step in which none began anew. `before` says of each piece what was live ahead of it:
    what has come to life since, and still lives, begins anew here, at `mask_restart`. So a
    connection that rises displaces another only where its mask variable is the higher one, and all
    that are left keep their distances. Parameters are written, and what was counted is counted
    again. `last`, how far they were lowered before, says where to look first. Collective where
    tensors are sharded.
    """
    distance = _distance(held, limit, last)
    counted: dict[int, Tensor] = {}
    kernel, batches, rest = _share_out(held)
    for batch in batches:
        pieces, was = [held.pieces[i] for i in batch], [before[i] for i in batch]
        found = kernel.lower(pieces, was, distance, options[batch[0]].mask_restart)
        counted |= dict(zip(batch, found, strict=True))
    for i in rest:
        counted[i] = reference.lower(held.pieces[i], before[i], distance, options[i])
    held.note(counted, moved=[*range(len(held.pieces))])
    return distance


def _distance(held: Holdings, limit: Limit, last: float | None) -> float:
    """The highest mask variable that may not live; 0 where none that is above 0 is too much."""
    if limit.share >= 1:
        # A course begins so, and there is nothing to look for.
        return 0.0
    prices, budget = prices_of(held, limit.share, limit.weights)
    keys: list[Tensor] = []
    # What must go lies near 0, and is seldom more than a small part of all.
    for bound in [times * last for times in _NEAR] if last else []:
        near, above = _near(held, bound)
        cost = cost_of(held, above, prices)
        if cost <= budget:
            keys, budget = near, budget - cost
            break
    else:
        keys = [keys_of(piece).clamp(min=0) for piece in held.pieces]
    lowest = max(0, lowest_bound(held, keys, prices, budget))
    return float(torch.tensor(lowest, dtype=torch.int32).view(torch.float32))


def _near(held: Holdings, bound: float) -> tuple[list[Tensor], list[Tensor]]:
    """(keys of the mask variables in (0, bound], how many lie above) of each piece.

    Of a piece that is not plain all keys, and none above.
    """
    nothing = torch.zeros((), dtype=torch.int64, device=held.device)
    keys, above = [held.zeros(0).int()] * len(held.pieces), [nothing] * len(held.pieces)
    kernel, batches, rest = _share_out(held)
    for batch in batches:
        found, over = kernel.low([held.pieces[i] for i in batch], bound)
        for i, mine, more in zip(batch, found, over, strict=True):
            keys[i], above[i] = mine, more
    for i in rest:
        piece = held.pieces[i]
        if is_plain(piece):
            keys[i], above[i] = reference.low(piece, bound)
        else:
            keys[i] = keys_of(piece).clamp(min=0)
    return keys, above


def _share_out(held: Holdings) -> tuple[Any, list[list[int]], list[int]]:
    """(what lowers pieces in one walk, the batches that it takes, the other pieces)."""
    kernel = find_kernel(held.device)
    lowers = kernel if isinstance(kernel, Lowering) else None
    return share_out(held, lowers, range(len(held.pieces)))
