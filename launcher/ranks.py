"""What ranks tell each other beside gradients: sums, stop flags, batch-norm statistics."""

from __future__ import annotations

import os
import random
import signal
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a stop that all ranks agree on at the next step."""

    def __init__(self) -> None:
        self._received: int | None = None
        # Spawned by `scl train`: when that process is gone, nobody is left to stop this one.
        self._parent = int(os.environ.get("SCL_PARENT_PID", "0"))
        # On its own gloo group: an agreement must not wait for, or stall, the GPU.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self) -> int | None:
        """The highest signal number any rank received, the same on all ranks; None if none did."""
        if self._received is None and self._parent and not psutil.pid_exists(self._parent):
            self._received = signal.SIGTERM
        flag = torch.tensor([self._received or 0])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag) or None


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks of a small tensor, in place."""
    dist.all_reduce(values)
    return values


def average_batch_norm(model: nn.Module) -> None:
    """Give all ranks the mean of their running statistics, in place.

    Each rank gathers them from its own part of the batch; an evaluation, or the model that is
    written, must not depend on which rank's they are.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers or dist.get_world_size() == 1:
        return
    flat = torch.cat([b.detach().flatten().float() for b in buffers])
    flat = sum_over_ranks(flat) / dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def local_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What differs between ranks and decides how training goes on: generators and buffers."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": _numpy_state(),
        "buffers": {name: b.detach().cpu().clone() for name, b in model.named_buffers()},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_local_state(model: nn.Module, device: torch.device, state: dict[str, Any]) -> None:
    """Undo `local_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    buffers = dict(model.named_buffers())
    for key, value in state["buffers"].items():
        buffers[key].copy_(value)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's `value` on rank 0, in order of rank; None elsewhere. Collective."""
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def from_main(value: Any) -> Any:
    """Rank 0's `value` on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    # As a tensor, so that a checkpoint loads without unpickling code.
    return (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
