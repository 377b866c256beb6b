"""One step over everything this process holds: settings, first pass, normalisation, second pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels import reference
from sclcore.kernels.find import find_kernel
from sclcore.kernels.kernel import Kernel
from sclcore.kernels.options import OF_GROUP, Options
from sclcore.kernels.reference import Cuts, step_weight
from sclcore.layout.piece import Piece
from sclcore.optim.layerwise import share_of
from sclcore.optim.rules import adamw_of

# Below this a feature's gradient is nothing but zeros: it only keeps 0 / 0 from being NaN.
_EPS = 1e-12

Grads = Mapping[int, Tensor]
"""G of each piece that has one, flat, by its place in `Holdings.pieces`."""


def options_of(held: Holdings) -> list[Options]:
    """The settings of each piece at this step."""
    options: list[Options] = []
    for piece in held.pieces:
        group, place = held.owners[piece.index], held.places[piece.index]
        rates = {name: group[name] for name in OF_GROUP}
        rates["lr"] *= share_of(group, place)
        options.append(
            Options(
                **rates,
                price=group["lam"] * group["costs"][place],
                noise=group["updates"] * 0x2545F491 + piece.index * 0x9E3779B1,
                adamw=adamw_of(group),
            )
        )
    return options


def first_pass(
    held: Holdings, grads: Grads, options: Sequence[Options]
) -> tuple[Tensor, Tensor | None]:
    """(Σ (∂L/∂m)² per feature, gradient per unit of coarse tensors), piece after piece."""
    learning = [i for i in grads if options[i].mask_lr]
    sums = [held.zeros(piece.features) for piece in held.pieces]
    units = [held.zeros(p.units if p.tensor.unit > 1 else 0) for p in held.pieces]
    kernel, batches, rest = share_out(held, find_kernel(held.device), learning)
    for batch in batches:
        found = kernel.sums(*_of(batch, held.pieces, grads, options))
        parts = found.split([held.feature_counts[i] for i in batch])
        for i, part in zip(batch, parts, strict=True):
            sums[i] = part
    for i in rest:
        piece = held.pieces[i]
        gradient = reference.unit_sums(piece, reference.raw_gradient(piece, grads[i], options[i]))
        sums[i] = reference.squares(piece, gradient, held.cut_units(i))
        if piece.tensor.unit > 1:
            units[i] = gradient
    coarse = any(tensor.unit > 1 for tensor in held.tensors)
    return torch.cat([held.zeros(0), *sums]), torch.cat([held.zeros(0), *units]) if coarse else None


def second_pass(
    held: Holdings,
    grads: Grads,
    options: Sequence[Options],
    divisors: Tensor,
    cuts: Sequence[Cuts],
) -> None:
    """Move everything and leave what was counted in `held`. Collective where N:M blocks are cut."""
    parts = divisors.split(held.feature_counts)
    kernel, batches, rest = share_out(held, find_kernel(held.device), [*grads])
    counted: dict[int, Tensor] = {}
    for batch in batches:
        divisor = divisors if len(batch) == len(parts) else torch.cat([parts[i] for i in batch])
        pieces, own, settings = _of(batch, held.pieces, grads, options)
        found = _fused(kernel, pieces, own, settings, divisor)
        counted |= dict(zip(batch, found, strict=True))
    before = {
        i: reference.advance(held.pieces[i], grads[i], options[i], parts[i], cuts[i]) for i in rest
    }
    blocks = held.new_blocks()
    for i, was in before.items():
        counted[i] = reference.finish(held.pieces[i], was, blocks[i])
    held.note(counted, moved=[i for i in grads if options[i].mask_lr])


def _fused(
    kernel: Kernel,
    pieces: list[Piece],
    grads: list[Tensor],
    options: list[Options],
    divisors: Tensor,
) -> Tensor:
    """The second pass of a fused step, which knows SGD only: AdamW moves the weights after it."""
    if options[0].adamw is None:
        return kernel.update(pieces, grads, options, divisors)
    before = [reference.live(piece) for piece in pieces]
    still = [replace(each, lr=0.0, weight_decay=0.0) for each in options]
    counted = kernel.update(pieces, grads, still, divisors)
    for piece, grad, was, each in zip(pieces, grads, before, options, strict=True):
        step_weight(piece, grad, was, each)
        reference.write(piece, reference.live(piece))
    return counted


def normalisers(held: Holdings, sums: Tensor, layer_sums: Tensor) -> tuple[Tensor, Tensor]:
    """(rms of the mask gradient per feature, what it is divided by), piece after piece.

    `sums` are of squares of whole features, `layer_sums` of whole tensors.
    """
    rms = (sums / held.variables).sqrt()
    pools = held.pools(layer_sums)[held.tensor_of_feature]
    squares = torch.where(held.pooled, pools, sums)
    divisors = (squares / held.divided_by).sqrt() + _EPS
    return rms, divisors.masked_fill_(held.unnormalised, 1.0)


def share_out(
    held: Holdings, kernel: Any, wanted: Sequence[int]
) -> tuple[Any, list[list[int]], list[int]]:
    """(`kernel`, batches of pieces that it takes at once, the other pieces); None takes none."""
    if kernel is None:
        return None, [], [*wanted]
    chosen = set(wanted)
    batches = [[i for i in batch if i in chosen] for batch in held.plain_batches]
    fused = {i for batch in batches for i in batch}
    return kernel, [batch for batch in batches if batch], [i for i in wanted if i not in fused]


def _of(chosen: Sequence[int], *lists: Sequence[Any] | Grads) -> tuple[list[Any], ...]:
    return tuple([values[i] for i in chosen] for values in lists)
