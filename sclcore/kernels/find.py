"""Which fused step there is for a device."""

from __future__ import annotations

import functools
import logging
import os

import torch

from sclcore.kernels.kernel import Kernel

_log = logging.getLogger(__name__)


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
