"""The guard against dead layers: the best-scored connections stay, `min_connections` of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.holdings import Holdings
from sclcore.shards import Piece
from sclcore.update import LIVE, live, write


def farthest(held: Holdings, index: int) -> float:
    """How far one step can lower a mask variable of tensor `index` at the present settings.

    No normalised gradient exceeds √(number of mask variables), for then all others are 0; and no
    momentum buffer the geometric series of such steps. inf without normalisation.
    """
    group, tensor, scope = held.owners[index], held.tensors[index], held.scope(index)
    if scope == "none":
        return math.inf
    count = tensor.variables_per_feature if scope == "feature" else tensor.numel // tensor.unit
    largest = math.sqrt(count) + group["lam"] * group["costs"][held.places[index]]
    return group["mask_lr"] * largest / (1 - group["mask_momentum"])


def least(held: Holdings, index: int) -> int:
    """The connections that tensor `index` must keep; 0 while its masks are frozen."""
    group = held.owners[index]
    return min(group["min_connections"], held.tensors[index].numel) if group["mask_lr"] else 0


def may_die(held: Holdings, safe: Sequence[int], since: Sequence[float]) -> bool:
    """Whether this step may leave some tensor with too few connections; alike on all ranks.

    `safe` connections of each tensor had, after the last step, mask variables above `since`.
    """
    return any(
        safe[i] // (tensor.n_m[1] if tensor.n_m else 1) < least(held, i)
        or (least(held, i) and farthest(held, i) > since[i])
        for i, tensor in enumerate(held.tensors)
    )


def keep_layers_alive(held: Holdings) -> list[str]:
    """Give back what tensors lost below `min_connections`; returns their names.

    Collective where tensors are sharded.
    """
    counts = held.total_counts()
    by_index = {piece.index: piece for piece in held.pieces}
    moved = {held.pieces[i].index for i in held.moved}
    names = []
    for index, name in enumerate(held.names):
        if counts[index] >= least(held, index) or (held.exchange is None and index not in moved):
            continue
        names.append(name)
        piece = by_index.get(index)
        keep_alive(piece, least(held, index), held.exchange.group if held.exchange else None)
        if piece is not None:
            on = live(piece)
            write(piece, on)
            held.counts[index, LIVE] = on.sum()
    return names


def best_units(piece: Piece | None, count: int) -> list[tuple[float, int]]:
    """The `count` highest mask variables of a piece, as (value, number of the unit).

    Of an N:M block only its best count: raising others would not make them live.
    """
    if piece is None or not piece.length:
        return []
    values = piece.mask.float()
    if piece.tensor.n_m is not None:
        values = values.masked_fill(~_chosen(piece), -torch.inf)
    unit = piece.tensor.unit
    firsts = torch.arange(-(-piece.start // unit) * unit - piece.start, piece.length, unit)
    if piece.start % unit:
        firsts = torch.cat([firsts.new_zeros(1), firsts])
    top = values[firsts.to(values.device)].topk(min(count, len(firsts)))
    numbers = ((piece.start + firsts[top.indices.cpu()]) // unit).tolist()
    return [*zip(top.values.tolist(), numbers, strict=True)]


def keep_alive(piece: Piece | None, count: int, ranks: dist.ProcessGroup | None) -> None:
    """Raise the best mask variables of a tensor above 0, for `count` connections.

    `piece` is what this rank holds of the tensor. Collective over `ranks`, where there are any; all
    choose the same connections. The lower position wins between equals.
    """
    own = best_units(piece, count)
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


def _chosen(piece: Piece) -> Tensor:
    """Where H(m) would be 1 if every mask variable were positive."""
    return live(dataclasses.replace(piece, mask=piece.mask - piece.mask.min() + 1))
