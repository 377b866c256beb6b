"""What a fused step offers, and to which pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sclcore.kernels.options import Options
from sclcore.layout.piece import Piece


class Kernel(Protocol):
    """Both passes over plain pieces (`is_plain`), one piece after the other in every vector.

    All options agree but for `price` and `noise`. With `mask_lr` 0 the masks and their momentum
    stay as they are, and only `update` is called.
    """

    def sums(
        self, pieces: Sequence[Piece], grads: Sequence[Tensor], options: Sequence[Options]
    ) -> Tensor:
        """Σ (∂L/∂m)² of each feature [features of all pieces]."""
        ...

    def update(
        self,
        pieces: Sequence[Piece],
        grads: Sequence[Tensor],
        options: Sequence[Options],
        divisors: Tensor,
    ) -> Tensor:
        """Move w, m and momenta, write v; returns what the reference counts [pieces, 3].

        `divisors` [features of all pieces] is what mask gradients are divided by.
        """
        ...


@runtime_checkable
class Lowering(Protocol):
    """What a kernel offers that lowers the mask variables of plain pieces as well."""

    def low(self, pieces: Sequence[Piece], bound: float) -> tuple[list[Tensor], Tensor]:
        """The reference's `low` of each piece: (keys in any order, how many above [pieces])."""
        ...

    def lower(
        self, pieces: Sequence[Piece], before: Sequence[Tensor], distance: float, restart: float
    ) -> Tensor:
        """The reference's `lower` of each piece [pieces, 3]."""
        ...


def is_plain(piece: Piece) -> bool:
    """Whether a fused step can take it: each weight has its own mask variable, all in float32."""
    plain = piece.tensor.unit == 1 and piece.tensor.n_m is None and piece.length > 0
    return plain and piece.mask.dtype == piece.weight.dtype == torch.float32
