"""The torch optimizer around a method: what all of them need, whatever their rule is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sclcore.driver.method import DrivenMethod
from sclcore.driver.net import Connected
from sclcore.optim.rules import step_dense, total_norm
from sclcore.optim.settings import check_rule, settings_of
from sclcore.optim.sparse import SparseOptimizer
from sclcore.optim.written import LastWritten, say_lost


class Driver(SparseOptimizer):
    """SGD or AdamW (`sclcore.optim.rules`) with a method for the masks of groups with connections.

    `params` are parameter groups made by `connection_groups`; `lr` and the settings of the weights
    (`momentum`, `nesterov`, `weight_decay`, `weight_rule`, `betas`, `eps`) are those of `SCL`.
    `seed` decides what a method draws, the same on all ranks.

    What a method may ask of it is `sclcore.driver.net.Net`. Its `progress` a `Scheduler` sets.

    A loop of one's own calls `before_update` before the first forward pass of an update, and
    between it and `step`, where `passes` is more than 1, each of the others after `before_pass`.
    """

    def __init__(
        self,
        method: DrivenMethod,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float | None = None,
        nesterov: bool | None = None,
        weight_decay: float = 0.0,
        weight_rule: str = "sgd",
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        seed: int = 0,
    ) -> None:
        self.method = method
        self._group_keys = frozenset(method.group_keys)
        self.seed = seed
        params = params if isinstance(params, Tensor) else [*params]
        given = {"momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        defaults = {
            **settings_of(given, params, weight_rule),
            "lr": lr,
            "weight_decay": weight_decay,
            "weight_rule": weight_rule,
            "progress": 0.0,
            "updates": 0,
            "connections": False,
        }
        super().__init__(params, defaults)
        if method.begins_sparse:
            self.write_weights()
            # An engine may replace the parameters; the same state is made again for those.
            self.state.clear()

    def _reset(self) -> None:
        super()._reset()
        self._written = LastWritten()
        self._is_drawn = False
        self._losses: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{key: self.__dict__[key] for key in ("method", "seed", "_group_keys")},
        }

    def _validate(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0 or math.isinf(group[name]):
                raise ValueError(f"{name} must be 0 or more and finite, not {group[name]}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
        check_rule(group)
        kind = self.method.name
        if any(isinstance(p, DTensor) for p in group["params"]):
            raise ValueError(f"{kind} needs whole tensors: FSDP2's sharded ones are unsupported")
        coarse = [g for g in group.get("granularity", ()) if g != "weight"]
        if coarse or any(group.get("n_m", ())):
            raise ValueError(f"{kind} knows single weights only, no coarser granularity and no N:M")

    @property
    def passes(self) -> int:
        """Forward passes of an update."""
        return self.method.passes(self)

    @torch.no_grad()
    def before_update(self) -> None:
        """Prepare the parameters for the first forward pass of an update."""
        self._take_over_touched(self._watched)
        self._losses = [torch.zeros((), dtype=torch.float64)] * self.passes
        self.held_layers = []
        self.method.before_update(self)
        self._is_drawn = True
        self._note()

    @torch.no_grad()
    def before_pass(self, number: int) -> None:
        """Prepare the parameters for a further forward pass, or with 0 for the first one again."""
        self.method.before_pass(self, number)
        self._note()

    @torch.no_grad()
    def add_loss(self, number: int, loss: Tensor, share: float = 1.0) -> None:
        """Tell the loss of forward pass `number`: of a micro-batch, its `share` of the update."""
        self._losses[number] = self._losses[number].to(loss.device) + share * loss.detach().double()

    @property
    def losses(self) -> list[float]:
        """The mean loss of each forward pass of this update, over all ranks. Collective."""
        if not self._losses:
            raise RuntimeError(
                f"{self.method.name} needs to know of losses: call before_update() before the "
                "first forward pass of an update, and add_loss(0, loss) after it"
            )
        return [float(each) for each in self.mean_over_ranks(torch.stack(self._losses))]

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """A copy of `value`, averaged over the ranks where there are any. Collective."""
        value = value.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = self.param_groups[0]["params"][0].device
            moved = value.to(device)
            dist.all_reduce(moved)
            value = (moved / dist.get_world_size()).to(value.device)
        return value

    def random(self) -> torch.Generator:
        """Random numbers of this update: the same on all ranks, and after a resume; on the CPU."""
        # Two generators whose seeds are neighbours are unrelated: torch hashes them.
        return torch.Generator().manual_seed((self.seed + 1_000_003 * self.updates) % 2**63)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._undraw()
            return loss
        self.grad_norm = float(total_norm(self.param_groups))
        if not math.isfinite(self.grad_norm):
            self.skipped_steps += 1
            self._undraw()
            return loss
        if not self._is_drawn:
            self.held_layers = []
        updates = self.updates
        self._take_over_touched(self._watched)
        if self.method.step(self):
            self.move_others()
        for group in self.param_groups:
            if group["connections"]:
                group["updates"] = updates + 1
        self._is_drawn = False
        self._note()
        return loss

    def _undraw(self) -> None:
        """Leave the network as it is evaluated, where an update came to nothing."""
        if self._is_drawn:
            self.method.write(self)
            self._is_drawn = False
            self._note()

    def lr_progress(self, progress: float) -> float:
        """Where in the schedule of the learning rate the run is; a `Scheduler` asks it."""
        return self.method.lr_progress(progress)

    @torch.no_grad()
    def after_epoch(self, results: Mapping[str, float]) -> None:
        self.method.after_epoch(self, results)
        self._note()

    def _note(self) -> None:
        self._written.note(each.param for each in self._watched)

    @torch.no_grad()
    def read_weights(self) -> None:
        self._take_over(self._watched)

    def _take_over_touched(self, tensors: list[Connected]) -> None:
        touched = {id(p) for p in self._written.touched(each.param for each in tensors)}
        self._take_over([each for each in tensors if id(each.param) in touched])

    def _take_over(self, tensors: list[Connected]) -> None:
        lost = {each.name: self.method.take(self, each) for each in tensors}
        say_lost({name: count for name, count in lost.items() if count}, self._warn)

    @property
    def tensors(self) -> list[Connected]:
        """All tensors of connections, in the order of the groups, their state made if need be."""
        tensors = self._parameters(connections=True)
        # Not at the beginning: an engine may replace the parameters before the first step.
        fresh = [each for each in tensors if self.method.started_by not in each.state]
        if fresh:
            self.method.start(self, fresh)
        return tensors

    @property
    def _watched(self) -> list[Connected]:
        """The parameters that are written from a state of the method's."""
        tensors, latent = self.tensors, self.method.started_by
        return [*tensors, *(each for each in self.others if latent in each.state)]

    @property
    def others(self) -> list[Connected]:
        """All parameters outside of connections."""
        return self._parameters(connections=False)

    def _parameters(self, *, connections: bool) -> list[Connected]:
        return [
            each
            for group in self.param_groups
            if group["connections"] == connections
            for each in self._of_group(group)
        ]

    def _of_group(self, group: dict[str, Any]) -> Iterator[Connected]:
        params = group["params"]
        # What lies outside of connections has torch's names, if any.
        names = group.get("names", group.get("param_names", [""] * len(params)))
        transposed = group.get("transposed_groups", [0] * len(params))
        for name, param, groups in zip(names, params, transposed, strict=True):
            yield Connected(name, param, self.state[param], transposed=groups > 0)

    @property
    def settings(self) -> dict[str, Any]:
        """The group whose progress and updates count: the first of connections."""
        return next(group for group in self.param_groups if group["connections"])

    @property
    def progress(self) -> float:
        """The share of the run that lies behind this update."""
        return self.settings["progress"]

    @property
    def updates(self) -> int:
        """How many updates lie behind this one."""
        return self.settings["updates"]

    def move(self, masks: Iterable[Tensor]) -> None:
        """One update of the connections by their group's rule, with G ⊙ mask for a gradient.

        A mask is bool, or has a factor for each weight. Where a weight and all its buffers are 0
        under a mask of 0, they stay so.
        """
        every, updates = iter(masks), self.updates
        for group in self.param_groups:
            if not group["connections"]:
                continue
            grads = [p.grad for p in group["params"]]
            for p, grad, mask in zip(group["params"], grads, every, strict=False):
                p.grad = None if grad is None else _masked(grad, mask)
            step_dense(group, self.state)
            # It is counted when the whole update is made.
            group["updates"] = updates
            for p, grad in zip(group["params"], grads, strict=True):
                p.grad = grad

    def move_others(self) -> None:
        """One update of all parameters outside of connections."""
        for group in self.param_groups:
            if not group["connections"]:
                step_dense(group, self.state)

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        tensors = self.tensors
        masks = self.method.masks(self)
        return {each.name: mask for each, mask in zip(tensors, masks, strict=True)}

    def metrics(self) -> dict[str, float]:
        """What the method itself tells of the network."""
        return self.method.metrics(self)

    @torch.no_grad()
    def write_weights(self) -> None:
        self.method.write(self)
        self._note()

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


def _masked(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, grad, 0.0) if mask.dtype == torch.bool else mask * grad
