"""What others wrote into parameters of connections is taken over as latent weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.reference import live, write


def take_over(held: Holdings, params: Iterable[Tensor]) -> dict[str, int]:
    """Make the present values of `params` their latent weights.

    Masks stay, so zeros are written back where connections are dead. Returns, by name of the
    tensor, how many other values were there. An element that still has the value that follows from
    the state keeps its latent weight to the last bit.
    """
    wanted = {id(param) for param in params}
    lost: dict[str, int] = {}
    for piece, source, blocks in zip(held.pieces, held.sources, held.blocks, strict=True):
        if id(source.param) not in wanted:
            continue
        # A buffer stands for a parameter that cannot be seen flat: the values are in the target.
        values = piece.param if piece.target is None else piece.target.contiguous().view(-1)
        on = live(piece, blocks)
        written = torch.where(on, piece.weight, 0.0).to(values.dtype)
        changed = values != written
        if not changed.any():
            continue
        dead = int(torch.count_nonzero(changed & ~on))
        if dead:
            lost[piece.tensor.name] = lost.get(piece.tensor.name, 0) + dead
        piece.weight.copy_(torch.where(changed, values.to(piece.weight.dtype), piece.weight))
        write(piece, on)
    return lost
