"""What one step did to each layer, kept when somebody asks for it (`SCL.observing`)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.reference import FLIPS, REVIVALS
from sclcore.optim.sparse import Observation


def observe(held: Holdings, rms: Tensor, divisors: Tensor) -> dict[str, Observation]:
    """Observations of the layers whose masks have just moved, by name.

    `rms` and `divisors` are those of the features of each piece. Collective where tensors are
    sharded, and then the same on all ranks.
    """
    before, after = rms.split(held.feature_counts), (rms / divisors).split(held.feature_counts)
    if held.exchange is None:
        counts = held.counts.tolist()
        return {
            held.names[held.pieces[i].index]: Observation(
                counts[held.pieces[i].index][FLIPS],
                counts[held.pieces[i].index][REVIVALS],
                before[i],
                after[i],
            )
            for i in held.moved
        }
    counts = held.counts.clone()
    dist.all_reduce(counts, group=held.exchange.group)
    whole = _over_ranks(held, before), _over_ranks(held, after)
    return {
        name: Observation(numbers[FLIPS], numbers[REVIVALS], rms_before, rms_after)
        for name, numbers, rms_before, rms_after, owner in zip(
            held.names, counts.tolist(), *whole, held.owners, strict=True
        )
        if owner["mask_lr"]
    }


def _over_ranks(held: Holdings, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """One number per feature of each piece → of each tensor, from all ranks."""
    assert held.exchange is not None
    sizes = [tensor.features for tensor in held.tensors]
    message = held.zeros(sum(sizes))
    tensors = message.split(sizes)
    for piece, values in zip(held.pieces, parts, strict=True):
        for_all = 0 if piece.tensor.transposed_groups else piece.first_run
        # Of several ranks with a part of a feature, the one that holds its first element reports
        # it.
        skip = int(piece.start % piece.tensor.run > 0)
        if not piece.tensor.transposed_groups or piece.start == 0:
            tensors[piece.index][for_all + skip : for_all + piece.features] = values[skip:]
    dist.all_reduce(message, group=held.exchange.group)
    return [*tensors]
