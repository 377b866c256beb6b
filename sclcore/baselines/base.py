"""What the baselines share: the step around the rule, masks that are state, exact choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sclcore.outside import LastWritten, say_lost
from sclcore.passes import total_norm
from sclcore.sparse import SparseOptimizer
from sclcore.weights import check_rule, settings_of, step_dense


@dataclass(frozen=True)
class Connected:
    """One tensor of connections and its state."""

    name: str
    param: Tensor
    state: dict[str, Any]


class Baseline(SparseOptimizer):
    """SGD or AdamW (`sclcore.weights`) with a rule for the masks of groups with connections.

    A rule starts the state of a tensor (`_start`), makes the update of all groups of connections
    (`_step_connections`) and knows the masks. What it needs to know of the run is in the groups:
    `progress` ∈ [0, 1] at this update, which a `Scheduler` sets, and the number of `updates` before
    it. Gradients must be the same on all ranks; then masks are, bit for bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rule: dict[str, Any],
        *,
        momentum: float | None = None,
        nesterov: bool | None = None,
        weight_decay: float = 0.0,
        weight_rule: str = "sgd",
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
    ) -> None:
        params = params if isinstance(params, Tensor) else [*params]
        given = {"momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        defaults = {
            **settings_of(given, params, weight_rule, self._idle),
            "lr": lr,
            "weight_decay": weight_decay,
            "weight_rule": weight_rule,
            "progress": 0.0,
            "updates": 0,
            "connections": False,
            **rule,
        }
        super().__init__(params, defaults)

    def _reset(self) -> None:
        super()._reset()
        self._written = LastWritten()

    def _validate(self, group: dict[str, Any]) -> None:
        kind = type(self).__name__
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0 or math.isinf(group[name]):
                raise ValueError(f"{name} must be 0 or more and finite, not {group[name]}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
        check_rule(group)
        if any(isinstance(p, DTensor) for p in group["params"]):
            raise ValueError(f"{kind} needs whole tensors: FSDP2's sharded ones are unsupported")
        coarse = [g for g in group.get("granularity", ()) if g != "weight"]
        if coarse or any(group.get("n_m", ())):
            raise ValueError(f"{kind} knows single weights only, no coarser granularity and no N:M")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        self.grad_norm = float(total_norm(self.param_groups))
        if not math.isfinite(self.grad_norm):
            self.skipped_steps += 1
            return loss
        self.held_layers = []
        updates = self._first["updates"]
        connections = self._connections()
        touched = {id(p) for p in self._written.touched(each.param for each in connections)}
        self._take_over([each for each in connections if id(each.param) in touched])
        if self._step_connections(connections):
            for group in self.param_groups:
                if not group["connections"]:
                    step_dense(group, self.state)
        for group in self.param_groups:
            if group["connections"]:
                group["updates"] = updates + 1
        self._written.note(each.param for each in connections)
        return loss

    @torch.no_grad()
    def read_weights(self) -> None:
        self._take_over(self._connections())

    def _take_over(self, connections: list[Connected]) -> None:
        lost = {each.name: self._take_values(each) for each in connections}
        say_lost({name: count for name, count in lost.items() if count}, self._warn)

    def _take_values(self, each: Connected) -> int:
        """Make the present values of the parameter its weights; how many are 0 now, being dead."""
        raise NotImplementedError

    @torch.no_grad()
    def _connections(self) -> list[Connected]:
        """All tensors of connections, in the order of the groups, their state made if need be."""
        found = [
            Connected(name, param, self.state[param])
            for group in self.param_groups
            if group["connections"]
            for name, param in zip(group["names"], group["params"], strict=True)
        ]
        # Not at the beginning: an engine may replace the parameters before the first step.
        if any(not self._has_started(each.state) for each in found):
            self._start(found)
        return found

    @property
    def _first(self) -> dict[str, Any]:
        """The group whose progress and updates count: the first of connections."""
        return next(group for group in self.param_groups if group["connections"])

    def _has_started(self, state: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _start(self, connections: list[Connected]) -> None:
        """Make the state of tensors that have none, and write their effective weights."""
        raise NotImplementedError

    def _step_connections(self, connections: list[Connected]) -> bool:
        """The update of everything with masks; gradients are finite. Whether weights moved."""
        raise NotImplementedError

    def _move_weights(self, masks: list[Tensor]) -> None:
        """One update of the connections by their group's rule, with G ⊙ mask for a gradient.

        Where a weight and all its buffers are 0, they stay so.
        """
        every = iter(masks)
        for group in self.param_groups:
            if not group["connections"]:
                continue
            grads = [p.grad for p in group["params"]]
            for p, grad, mask in zip(group["params"], grads, every, strict=False):
                p.grad = None if grad is None else torch.where(mask, grad, 0.0)
            step_dense(group, self.state)
            for p, grad in zip(group["params"], grads, strict=True):
                p.grad = grad

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but masks stay bool; the parameters are set to what masks and state say."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
        self.write_weights()


class Masked(Baseline):
    """A baseline whose masks are bool tensors in its state: `mask`, of the parameter's shape.

    What is dead is exactly 0, weight and momentum, until the rule brings it back.
    """

    def masks(self) -> dict[str, Tensor]:
        return {each.name: each.state["mask"].clone() for each in self._connections()}

    @torch.no_grad()
    def write_weights(self) -> None:
        for each in self._connections():
            _bury(each)

    def _take_values(self, each: Connected) -> int:
        lost = int(torch.count_nonzero(each.param.masked_fill(each.state["mask"], 0.0)))
        _bury(each)
        return lost

    def _has_started(self, state: dict[str, Any]) -> bool:
        return "mask" in state

    def _start(self, connections: list[Connected]) -> None:
        for each, mask in zip(connections, self._first_masks(connections), strict=True):
            if "mask" not in each.state:
                each.state["mask"] = mask.to(each.param.device)
                _bury(each)

    def _first_masks(self, connections: list[Connected]) -> list[Tensor]:
        return [torch.ones_like(each.param, dtype=torch.bool) for each in connections]

    def _set_mask(self, each: Connected, mask: Tensor) -> None:
        each.state["mask"].copy_(mask)
        _bury(each)


def _bury(each: Connected) -> None:
    """Zero what is dead: the weight and all buffers of its shape."""
    mask = each.state["mask"]
    buffers = [
        value
        for value in each.state.values()
        if isinstance(value, Tensor) and value is not mask and value.shape == mask.shape
    ]
    for tensor in (each.param, *buffers):
        tensor.copy_(torch.where(mask, tensor, 0.0))


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` elements of a vector are the largest, as a bool vector; ties: the first ones.

    Written out because what topk does with ties depends on the device and on the version.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(len(scores) - count + 1).values
    above, level = scores > bound, scores == bound
    return above | (level & (level.cumsum(0) <= count - above.sum()))
