"""What ranks tell each other beside gradients: sums, stop flags, batch-norm statistics."""

from __future__ import annotations

import datetime
import os
import random
import signal
import socket
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.cluster.process import stops


@dataclass(frozen=True)
class Agreed:
    """What all ranks know at the same step."""

    signal: int | None
    """The highest signal number any rank received."""
    writing: bool
    """Some rank is still writing its part of a checkpoint."""
    save: bool
    """Some rank asks for a checkpoint."""


class Agreement:
    """One small message per step: who was asked to stop, who still writes, whether to save.

    Turns SIGTERM, SIGUSR1, SIGINT and SIGHUP into a stop that all ranks agree on at the next step.
    """

    def __init__(self, timeout_s: int) -> None:
        self._received: int | None = None
        # Forked by `scl train`: when that process is gone, nobody is left to stop this one.
        self._parent = int(os.environ.get("SCL_PARENT_PID", "0"))
        # On its own gloo group: an agreement must not wait for, or stall, the GPU.
        # It does not inherit a time-out: without one said here it would wait half an hour.
        timeout = datetime.timedelta(seconds=timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        for number in stops():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def at_step(self, *, writing: bool = False, save: bool = False) -> Agreed:
        """What at least one rank says here, the same on all ranks. Collective."""
        if self._received is None and self._parent and not psutil.pid_exists(self._parent):
            self._received = signal.SIGTERM
        flags = torch.tensor([self._received or 0, writing, save])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        number, writing, save = flags.tolist()
        return Agreed(number or None, bool(writing), bool(save))

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Every rank's `value` on rank 0, in order of rank; None elsewhere. Collective."""
        return gather_to_main(value, self._group)

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective."""
        return from_main(value, self._group)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks of a small tensor, in place."""
    dist.all_reduce(values)
    return values


def average_batch_norm(model: nn.Module) -> None:
    """Give all ranks the mean of their running statistics, in place.

    Each rank gathers them from its own part of the batch; an evaluation, or the model that is
    written, must not depend on which rank's they are.
    """
    buffers = dict(model.named_buffers())
    for name, mean in mean_batch_norm(model).items():
        buffers[name].copy_(mean)


def mean_batch_norm(model: nn.Module) -> dict[str, Tensor]:
    """The mean of all ranks' running statistics by name of the buffer, as float32. Collective."""
    norms = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in _statistics(m)}
    buffers = {name: b.detach() for name, b in model.named_buffers() if id(b) in norms}
    if not buffers or dist.get_world_size() == 1:
        return {}
    flat = torch.cat([b.flatten().float() for b in buffers.values()])
    flat = sum_over_ranks(flat) / dist.get_world_size()
    means = flat.split([b.numel() for b in buffers.values()])
    return {name: m.view_as(buffers[name]) for name, m in zip(buffers, means, strict=True)}


def _statistics(norm: _NormBase) -> list[Tensor]:
    return [b for b in (norm.running_mean, norm.running_var) if b is not None]


def local_state(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What differs between ranks and decides how training goes on: generators and buffers.

    The buffers are the model's own, not copies.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": _numpy_state(),
        "buffers": {name: b.detach() for name, b in model.named_buffers()},
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


def gather_to_main(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Every rank's `value` on rank 0, in order of rank; None elsewhere. Collective."""
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, group=group)
    return gathered


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `value` on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, group=group)
    return box[0]


def places_by_host() -> list[int]:
    """Each rank's place where those of a host come one after the other. Collective.

    Launchers number ranks so, but `srun --distribution=cyclic` does not.
    """
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    in_order = sorted(range(len(hosts)), key=lambda rank: (hosts.index(hosts[rank]), rank))
    return [in_order.index(rank) for rank in range(len(hosts))]


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    # As a tensor, so that a checkpoint loads without unpickling code.
    return (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
