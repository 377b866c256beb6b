"""The guard against dead layers: the best-scored connections stay, `min_connections` of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.reference import LIVE, NO_CUTS, chosen, live, write
from sclcore.layout.piece import Piece


def leasts(held: Holdings) -> list[int]:
    """The connections that each tensor must keep."""
    found = []
    for group, tensor in zip(held.owners, held.tensors, strict=True):
        n, m = tensor.n_m or (1, 1)
        found.append(min(group["min_connections"], tensor.numel // m * n))
    return found


def leasts_of_moved(held: Holdings) -> list[int]:
    """The same, and 0 where the last step did not move the masks of a tensor."""
    moved = {held.pieces[i].index for i in held.moved}
    return [
        least if owner["mask_lr"] and (held.exchange is not None or index in moved) else 0
        for index, (least, owner) in enumerate(zip(leasts(held), held.owners, strict=True))
    ]


def keep_layers_alive(held: Holdings, leasts: Sequence[int]) -> list[str]:
    """Give back what tensors lost below `leasts`; returns their names.

    Collective where tensors are sharded.
    """
    if not any(leasts):
        return []
    low = [i for i, count in enumerate(held.total_counts()) if count < leasts[i]]
    if not low:
        return []
    ranks = held.exchange.group if held.exchange else None
    own = {held.pieces[place].index: place for place in range(len(held.pieces))}
    blocks = held.new_blocks()
    for index in low:
        best: list[tuple[float, int]] = []
        piece = held.pieces[own[index]] if index in own else None
        if piece is not None:
            best = best_units(piece, leasts[index], blocks[own[index]])
        keep_alive(piece, best, leasts[index], ranks)
    blocks = held.new_blocks()
    for index in set(low) & own.keys():
        piece = held.pieces[own[index]]
        on = live(piece, blocks[own[index]])
        write(piece, on)
        held.counts[index, LIVE] = on.sum()
    return [held.names[index] for index in low]


def best_units(
    piece: Piece, count: int, blocks: Mapping[int, Tensor] = NO_CUTS.blocks
) -> list[tuple[float, int]]:
    """The `count` highest mask variables of a piece, as (value, number of the unit).

    Of an N:M block only its best count: raising others would not make them live.
    """
    if not piece.length:
        return []
    values = piece.mask
    if piece.tensor.n_m is not None:
        values = values.masked_fill(~chosen(piece, blocks), -torch.inf)
    unit = piece.tensor.unit
    firsts = piece.first_of_units()
    # Not topk, whose choice between equals is anybody's guess.
    top = values[firsts.to(values.device)].sort(descending=True, stable=True)
    numbers = ((piece.start + firsts[top.indices[:count].cpu()]) // unit).tolist()
    return [*zip(top.values[:count].tolist(), numbers, strict=True)]


def keep_alive(
    piece: Piece | None,
    own: list[tuple[float, int]],
    count: int,
    ranks: dist.ProcessGroup | None,
) -> None:
    """Raise the best mask variables of a tensor above 0, for `count` connections.

    `piece` is what this rank holds of the tensor, and `own` the best of it (`best_units`).
    Collective over `ranks`, where there are any; all choose the same connections. The lower
    position wins between equals.
    """
    if ranks is not None:
        everyone: list[list[tuple[float, int]]] = [[] for _ in range(dist.get_world_size(ranks))]
        dist.all_gather_object(everyone, own, group=ranks)
        own = [best for part in everyone for best in part]
    if piece is None:
        return
    ordered = sorted(set(own), key=lambda best: (-best[0], best[1]))
    unit = piece.tensor.unit
    for _, number in ordered[: -(-count // unit)]:
        first, last = max(number * unit, piece.start), min((number + 1) * unit, piece.end)
        if first < last:
            mine = piece.mask[first - piece.start : last - piece.start]
            mine.clamp_(min=torch.finfo(mine.dtype).tiny)
