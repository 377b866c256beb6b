"""Optimizer state by parameter name, whatever the engine made of the optimizer's tensors.

A rank gives what it holds and takes what it needs, by name and stretch of elements: a checkpoint
written by any number of ranks in any ZeRO stage is thereby read by any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from launcher.checkpoints.saved_optimizer import Pieces
from launcher.run.zero import flat_shards
from sclcore import SCL
from sclcore.sparse import SparseOptimizer

# The float32 copy that is trained where the model itself has less precision.
_MASTER = "master"


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of each group's parameters; to be asked before an engine replaces them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


@dataclass(frozen=True)
class _Part:
    """Elements `start` … `start + length` of parameter `name`: in `tensor`, from `offset` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    tensor: Tensor
    offset: int


class Source(Protocol):
    """State by parameter name and stretch of elements; `updates` by parameter group."""

    updates: list[int]

    def read(self, name: str, start: int, length: int) -> dict[str, Tensor]: ...


class OptimizerState:
    """Which part of each parameter's state this rank holds, under a DeepSpeed `engine`.

    Under ZeRO it also tells SCL what its flat tensors consist of. `names` are those of
    `parameter_names`. Raises RunError when DeepSpeed's slices are not what it says they are.
    """

    def __init__(
        self, engine: Any, model: nn.Module, optimizer: Optimizer, names: list[list[str]]
    ) -> None:
        # DeepSpeed chooses its accelerator when it is imported: not before the engine's module did.
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        wrapper = engine.optimizer
        self._zero = wrapper if isinstance(wrapper, DeepSpeedZeroOptimizer) else None
        self._optimizer = optimizer
        self._params = dict(model.named_parameters())
        self._parts = [*self._find_parts(names)]

    def _find_parts(self, names: list[list[str]]) -> Iterator[_Part]:
        groups = self._optimizer.param_groups
        if self._zero is None:
            for group, own in zip(groups, names, strict=True):
                for name, tensor in zip(own, group["params"], strict=True):
                    yield _Part(name, tuple(tensor.shape), 0, tensor.numel(), tensor, 0)
            return
        shards = flat_shards(self._zero, {id(p): name for name, p in self._params.items()})
        if isinstance(self._optimizer, SCL):
            learned = {i: shards[i] for i, group in enumerate(groups) if group["connections"]}
            ranks: Any = self._zero.dp_process_group
            self._optimizer.set_shards(learned, ranks)
        for group, own in zip(groups, shards, strict=True):
            [flat] = group["params"]
            for shard in own:
                yield _Part(shard.name, shard.shape, shard.start, shard.length, flat, shard.offset)

    def pieces(self) -> Pieces:
        """What this rank has to save: views of its state, not copies.

        Where nothing is sharded all ranks hold the same, and rank 0 saves it.
        """
        if self._zero is None and dist.get_rank() != 0:
            return {}
        return {
            part.name: {
                "shape": list(part.shape),
                "start": part.start,
                "length": part.length,
                "values": self._values(part),
            }
            for part in self._parts
        }

    @property
    def updates(self) -> list[int]:
        """How many updates each group has had; the same on all ranks.

        torch's AdamW counts them for each tensor, all alike; its SGD not at all.
        """
        state = self._optimizer.state
        counts = []
        for group in self._optimizer.param_groups:
            steps = [int(state[p]["step"]) for p in group["params"] if "step" in state.get(p, {})]
            counts.append(group.get("updates", max(steps, default=0)))
        return counts

    def load(self, saved: Source) -> None:
        """Take this rank's part of a saved state, once the model has its values.

        Raises CheckpointError when it is not of this model.
        """
        for part in self._parts:
            values = saved.read(part.name, part.start, part.length)
            param = self._params[part.name]
            own = param.detach().reshape(-1)[part.start : part.start + part.length]
            master = values.pop(_MASTER, own)
            if part.tensor is not param:
                _put(part, part.tensor.detach(), master)
            for key, value in values.items():
                state = self._optimizer.state[part.tensor]
                if value.ndim == 0:
                    state[key] = value.to(part.tensor.device, copy=True)
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(part.tensor, dtype=value.dtype)
                _put(part, state[key], value)
        for group, updates in zip(self._optimizer.param_groups, saved.updates, strict=True):
            if "updates" in group:
                group["updates"] = updates
            elif isinstance(self._optimizer, AdamW):
                for p in group["params"]:
                    if p in self._optimizer.state:
                        step = torch.tensor(float(updates), device=p.device)
                        self._optimizer.state[p]["step"] = step
        if isinstance(self._optimizer, SparseOptimizer):
            self._optimizer.write_weights()
        if self._zero is not None:
            self._zero.update_lp_params()
            return
        for part in self._parts:
            # Where the optimizer trains float32 copies, the model follows them.
            self._params[part.name].detach().copy_(part.tensor.detach())

    def _values(self, part: _Part) -> dict[str, Tensor]:
        """This rank's stretch of everything known of a parameter, and single numbers (0-dim)."""
        state = self._optimizer.state.get(part.tensor, {})
        values = {
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step" and value.shape == part.tensor.shape
        }
        if part.tensor.dtype != self._params[part.name].dtype:
            values[_MASTER] = part.tensor
        numbers = {
            key: value.detach()
            for key, value in state.items()
            if isinstance(value, Tensor) and key not in ("step", *values) and value.ndim == 0
        }
        return {key: _stretch(part, value) for key, value in values.items()} | numbers


def _stretch(part: _Part, value: Tensor) -> Tensor:
    """The elements of a part, in row-major order."""
    return value.detach().reshape(-1)[part.offset : part.offset + part.length]


def _put(part: _Part, target: Tensor, values: Tensor) -> None:
    """Copy the elements of a part to where this rank holds them."""
    with torch.no_grad():
        values = values.to(target.device)
        if target.ndim != 1 or target.numel() == part.length:
            target.copy_(values.view(target.shape))
        else:
            target[part.offset : part.offset + part.length] = values
