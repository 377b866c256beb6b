"""Fused steps: the same two passes as `sclcore.update`, for many pieces at once."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sclcore.options import Options
from sclcore.shards import Piece

_log = logging.getLogger(__name__)


class Kernel(Protocol):
    """Both passes over plain pieces (`is_plain`), one piece after the other in every vector.

    All options agree but for `price`, `reach`, `drag` and `noise`. With `mask_lr` 0 (and so `drag`
    0) the masks and their momentum stay as they are, and only `update` is called.
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
        """Move w, m and momenta, write v; returns what `sclcore.update.update` counts [pieces, 4].

        `divisors` [features of all pieces] is what mask gradients are divided by.
        """
        ...


def is_plain(piece: Piece) -> bool:
    """Whether a fused step can take it: each weight has its own mask variable, all in float32."""
    plain = piece.tensor.unit == 1 and piece.tensor.n_m is None and piece.length > 0
    return plain and piece.mask.dtype == piece.weight.dtype == torch.float32


def find_kernel(device: torch.device) -> Kernel | None:
    """The fused step for `device`, None where the reference is used. SCL_FUSED=0 turns it off.

    It is the same one throughout a process, so that no run changes its rounding half-way.
    """
    return None if os.environ.get("SCL_FUSED") == "0" else _kernel(device)


@functools.cache
def _kernel(device: torch.device) -> Kernel | None:
    # Imported here: what they need (a C compiler, Triton) is not everywhere.
    try:
        if device.type == "cpu":
            from sclcore.kernels.cpu import CpuKernel

            return CpuKernel()
        if device.type == "cuda":
            from sclcore.kernels.cuda import CudaKernel

            return CudaKernel(device)
    except (OSError, ImportError) as error:
        _log.warning("no fused step on %s, the plain one is used: %s", device, error)
    return None
