"""What a fused step offers, and to which pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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


def is_plain(piece: Piece) -> bool:
    """Whether a fused step can take it: each weight has its own mask variable, all in float32."""
    plain = piece.tensor.unit == 1 and piece.tensor.n_m is None and piece.length > 0
    return plain and piece.mask.dtype == piece.weight.dtype == torch.float32
