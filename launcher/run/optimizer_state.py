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

from launcher.checkpoints.manifest import CheckpointError
from launcher.checkpoints.saved_optimizer import Pieces
from launcher.errors import RunError
from launcher.run import zero3
from launcher.run.parameters import Parameters
from launcher.run.zero import Sliced
from sclcore.optim.sparse import SparseOptimizer

# The float32 copy that is trained where the model itself has less precision.
_MASTER = "master"
_UNSHARDED = "use engine.zero_stage=0, where every rank holds whole parameters"


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of each group's parameters; to be called before an engine replaces them."""
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

    def read_whole(self, name: str) -> dict[str, Any]: ...


class OptimizerState:
    """Which part of each parameter's state this rank holds, under a DeepSpeed `engine`.

    Under ZeRO it also tells SCL what its flat tensors consist of. `names` are those of
    `parameter_names`. Raises RunError when DeepSpeed's slices are not what it says they are.
    """

    def __init__(
        self, engine: Any, model: nn.Module, optimizer: Optimizer, names: list[list[str]]
    ) -> None:
        self._optimizer = optimizer
        self._params = dict(model.named_parameters())
        self.parameters = _parameters_of(engine, model)
        self._parts = [*self._find_parts(names)]

    def _find_parts(self, names: list[list[str]]) -> Iterator[_Part]:
        groups, shards = self._optimizer.param_groups, self.parameters.shards
        if shards is None:
            for group, group_names in zip(groups, names, strict=True):
                for name, tensor in zip(group_names, group["params"], strict=True):
                    yield _Part(name, tuple(tensor.shape), 0, tensor.numel(), tensor, 0)
            return
        if isinstance(self._optimizer, SparseOptimizer):
            learned = {i: shards[i] for i, group in enumerate(groups) if group["connections"]}
            assert self.parameters.ranks is not None
            self._optimizer.set_shards(learned, self.parameters.ranks)
        for group, group_shards in zip(groups, shards, strict=True):
            [flat] = group["params"]
            for shard in group_shards:
                yield _Part(shard.name, shard.shape, shard.start, shard.length, flat, shard.offset)

    def pieces(self) -> Pieces:
        """What this rank has to save: views of its state, not copies.

        Where nothing is sharded all ranks hold the same, and rank 0 saves it. Raises RunError, on
        all ranks, for state that a checkpoint cannot hold.
        """
        self._check_owners()
        groups = self._optimizer.param_groups
        updates = {
            id(p): n for group, n in zip(groups, self.updates, strict=True) for p in group["params"]
        }
        pieces = {part.name: self._piece(part, updates[id(part.tensor)]) for part in self._parts}
        return {} if not self._is_sharded and dist.get_rank() != 0 else pieces

    @property
    def _is_sharded(self) -> bool:
        return self.parameters.shards is not None

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

        Raises CheckpointError when it is not of this model, or is of whole parameters and this
        rank holds slices.
        """
        for part in self._parts:
            values = saved.read(part.name, part.start, part.length)
            current = self.parameters.read(part.name, part.start, part.length)
            master = values.pop(_MASTER, current)
            if part.tensor is not self._params[part.name]:
                _put(part, part.tensor.detach(), master)
            for key, value in values.items():
                state = self._optimizer.state[part.tensor]
                if value.ndim == 0:
                    state[key] = value.to(part.tensor.device, copy=True)
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(part.tensor, dtype=value.dtype)
                _put(part, state[key], value)
        self._load_updates(saved.updates)
        for part in self._parts:
            self._load_whole(part, saved.read_whole(part.name))
        if isinstance(self._optimizer, SparseOptimizer):
            self._optimizer.write_weights()
        if self._is_sharded:
            self.parameters.update()
            return
        for part in self._parts:
            # Where the optimizer trains float32 copies, the model follows them.
            self._params[part.name].detach().copy_(part.tensor.detach())

    def _load_updates(self, counts: list[int]) -> None:
        for group, updates in zip(self._optimizer.param_groups, counts, strict=True):
            if "updates" in group:
                group["updates"] = updates
            elif isinstance(self._optimizer, AdamW):
                for p in group["params"]:
                    if p in self._optimizer.state:
                        step = torch.tensor(float(updates), device=p.device)
                        self._optimizer.state[p]["step"] = step

    def _load_whole(self, part: _Part, whole: dict[str, Any]) -> None:
        if whole and self._is_sharded:
            raise CheckpointError(
                f"the checkpoint holds {next(iter(whole))!r} of {part.name} as a whole, which "
                f"ranks that share a parameter out cannot take: {_UNSHARDED}"
            )
        for key, value in whole.items():
            self._optimizer.state[part.tensor][key] = _moved(value, part.tensor.device)

    def _check_owners(self) -> None:
        """Refuse state that belongs to no parameter: nothing could give it back."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for owner, values in self._optimizer.state.items():
            if id(owner) not in known and values:
                raise RunError(
                    f"the optimizer keeps state of {owner!r:.60}, which is none of its parameters, "
                    "and a checkpoint cannot hold that: keep it in optimizer.state[parameter]"
                )

    def _piece(self, part: _Part, updates: int) -> dict[str, Any]:
        """What this rank saves of a parameter: its stretch of each tensor, and what cannot be cut.

        `updates` are those of its group, which are saved for all its parameters at once.
        """
        state = self._optimizer.state.get(part.tensor, {})
        values: dict[str, Tensor] = {}
        whole: dict[str, Any] = {}
        for key, value in state.items():
            counted = key == "step" and isinstance(self._optimizer, AdamW)
            if value is None or (counted and int(value) == updates):
                continue
            if isinstance(value, Tensor) and value.shape == part.tensor.shape:
                values[key] = _stretch(part, value)
                continue
            self._check_whole(part, key, value)
            if isinstance(value, Tensor) and value.ndim == 0 and not counted:
                values[key] = value.detach()
            else:
                whole[key] = value
        if part.tensor.dtype != self._params[part.name].dtype:
            values[_MASTER] = _stretch(part, part.tensor)
        piece = {
            "shape": list(part.shape),
            "start": part.start,
            "length": part.length,
            "values": values,
        }
        return piece | ({"whole": whole} if whole else {})

    def _check_whole(self, part: _Part, key: str, value: Any) -> None:
        """Refuse state that has not one element for each weight, where it cannot be saved whole."""
        if self._is_sharded:
            what = "×".join(map(str, value.shape)) if isinstance(value, Tensor) else repr(value)
            raise RunError(
                f"the optimizer keeps {key!r} ({what:.60}) of a slice of parameters, {part.name} "
                "among them, and it cannot be told what of it is whose, so no checkpoint can hold "
                f"it: {_UNSHARDED}"
            )
        if not _is_plain(value):
            raise RunError(
                f"the optimizer keeps {key!r} of {part.name}, of type {type(value).__name__}, "
                "which a checkpoint cannot hold: it should be tensors, numbers, strings, and "
                "lists, tuples and mappings of these"
            )


def _parameters_of(engine: Any, model: nn.Module) -> Parameters:
    # DeepSpeed chooses its accelerator when it is imported: not before the engine's module did.
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if (stage_3 := zero3.stage_3_of(engine)) is not None:
        return zero3.Stretches(model, stage_3)
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return Sliced(model, wrapper)
    return Parameters(model)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of `value`, with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


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
