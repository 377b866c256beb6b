"""What every optimizer that owns masks can say of them, whatever rule moves them.

`SCL` learns its masks, a `Driver` of `sclcore.methods` has them by other rules. For all of them
the module's parameter is the effective weight, zeros included, `p.grad` is ∂L/∂v of all
connections, dead ones too, and everything latent is optimizer state. A training loop that asks
only what is said here works with any of them.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sclcore.optim.settings import clear_idle
from sclcore.optim.shards import Shard

# Of a parameter group, what `connection_groups`, schedulers and engines write into it.
_OURS = {
    *("params", "param_names", "names", "shapes", "costs", "transposed_groups", "granularity"),
    *("n_m", "shards", "connections", "updates", "progress", "lr_shares"),
}
# The names under which DDP and AveragedModel, torch.compile and FSDP hold the model they wrap.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Observation:
    """What one observed step did to one layer.

    `flips` is the number of masks that changed, `revivals` that of those which came to life.
    `rms_before` and `rms_after` are the root mean squares of the mask gradient per output feature,
    before and after normalisation.
    """

    flips: int
    revivals: int
    rms_before: Tensor
    rms_after: Tensor


class SparseOptimizer(Optimizer):
    """An optimizer that decides which connections live.

    Groups with `connections: True` (made by `connection_groups`) have masks, the others are dense.

    A step whose gradient is not finite changes nothing and is counted in `skipped_steps`. After
    each step `grad_norm` holds the 2-norm of the gradient over all parameters, and `held_layers`
    the names of the layers that were kept from dying in that step.
    """

    skipped_steps: int
    grad_norm: float
    held_layers: list[str]

    passes: int = 1
    """Forward passes of an update. The first is differentiated, the others only give their loss."""

    _group_keys: frozenset[str] = frozenset()
    """What else a parameter group may hold."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._reset()
        super().__init__(params, defaults)
        if not any(group["connections"] for group in self.param_groups):
            raise ValueError(
                "no parameter group holds connections: pass connection_groups(model), not "
                "model.parameters()"
            )

    def _reset(self) -> None:
        """What is no part of the state: it starts anew in a copy of the optimizer."""
        self.skipped_steps = 0
        self.grad_norm = math.nan
        self.held_layers = []
        self.observing = False
        self.observations: dict[str, Observation] = {}
        self._has_warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "skipped_steps" not in self.__dict__:
            self._reset()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with `connections: True` its tensors get masks, or it is not added."""
        given = set(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_names(given)
            self._validate(group)
            clear_idle(group, given)
            if group["connections"]:
                self._complete(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_names(self, given: set[str]) -> None:
        """ValueError for a setting of a group that nobody would ask for."""
        known = {name for name in self.defaults if name not in _OURS}
        noted = {f"initial_{name}" for name in self.defaults}
        if unknown := sorted(given - known - noted - _OURS - self._group_keys):
            kind = type(self).__name__
            raise ValueError(
                f"unknown option {unknown[0]!r}: {kind} knows {', '.join(sorted(known))}"
            )

    def _validate(self, group: dict[str, Any]) -> None:
        """ValueError with one sentence where an option is out of its range."""
        raise NotImplementedError

    def _warn(self, text: str) -> None:
        """Say something once: a loop that does it at every step would say it at every step."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(text, stacklevel=2)

    def before_update(self) -> None:
        """To be called before the first forward pass of an update; most methods need it not."""

    def before_pass(self, number: int) -> None:
        """To be called before another forward pass of an update; with 0 the first one's is back."""

    def add_loss(self, number: int, loss: Tensor, share: float = 1.0) -> None:
        """Tell the loss of forward pass `number`: of a micro-batch, its `share` of the update."""

    def after_epoch(self, results: Mapping[str, float]) -> None:
        """Tell the results of an evaluation: `val/loss`, `val/top1`."""

    def metrics(self) -> dict[str, float]:
        """Series of the method's own, for a tracker."""
        return {}

    def set_shards(
        self, shards: Mapping[int, Sequence[Shard]], process_group: dist.ProcessGroup
    ) -> None:
        """Declare that groups have become one flat tensor each, of which ranks hold slices.

        Raises ValueError where the method needs whole tensors.
        """
        raise ValueError(f"{type(self).__name__} needs whole tensors on every rank")

    def masks(self) -> dict[str, Tensor]:
        """Which connections are live: parameter name → bool tensor of the parameter's shape.

        Collective where state is sharded, and whole on every rank all the same.
        """
        raise NotImplementedError

    def write_weights(self) -> None:
        """Set every connection's parameter to its effective weight, after state was loaded.

        Collective where state is sharded.
        """
        raise NotImplementedError

    def read_weights(self) -> None:
        """Take the present values of the parameters over as weights; what is dead stays 0.

        Each step does so on its own where PyTorch knows of a write, as after
        `model.load_state_dict`; it does not know of one through `p.data`. Collective where state
        is sharded.
        """
        raise NotImplementedError

    def apply_masks(self, model: nn.Module) -> None:
        """Set the dead connections of another model of the same network to 0, as `apply_masks`.

        An average of the weights over time (EMA, SWA) needs it: it holds a little of whatever died
        on the way. Collective where state is sharded.
        """
        apply_masks(model, self.masks())

    def live_connections(self) -> dict[str, int]:
        """How many connections of each tensor are live. Collective where state is sharded."""
        return {name: int(mask.sum()) for name, mask in self.masks().items()}

    def connection_sizes(self) -> dict[str, int]:
        """How many connections each tensor has, live and dead; in the order of `masks`."""
        return {
            name: math.prod(shape)
            for group in self.param_groups
            if group["connections"]
            for name, shape in zip(group["names"], group["shapes"], strict=True)
        }

    @property
    def connection_names(self) -> set[str]:
        """The names of the tensors whose elements are connections."""
        return set(self.connection_sizes())

    def mask_hash(self) -> str:
        """SHA-256 of all masks: equal on all ranks, and in two runs that chose the same network."""
        return hash_masks(self.masks())

    def _complete(self, group: dict[str, Any]) -> None:
        """What a group of connections says of its tensors, where it was left out."""
        size = len(group["params"])
        first = sum(len(g["params"]) for g in self.param_groups if g is not group)
        numbers = [f"param{first + i}" for i in range(size)]
        # Not "param_names": torch wants that in all groups or in none.
        group.setdefault("names", group.get("param_names", numbers))
        group.setdefault("shapes", [tuple(p.shape) for p in group["params"]])


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what is dead in `masks` (parameter name → bool, true is live) to 0 in `model`, in place.

    The model may be wrapped, by `AveragedModel`, DDP or `torch.compile`: what such wrappers put
    before a name is left out of account. Raises ValueError, and changes nothing, where the model
    has no parameter of that name and shape.
    """
    own = dict(model.named_parameters())
    bare = {_bare(name): param for name, param in own.items()}
    params = {name: own.get(name, bare.get(_bare(name))) for name in masks}
    for name, mask in masks.items():
        param = params[name]
        if param is None or param.shape != mask.shape:
            found = "none" if param is None else f"one of shape {tuple(param.shape)}"
            raise ValueError(
                f"the masks are not of this model: {name} of shape {tuple(mask.shape)} is masked, "
                f"and the model has {found} of that name"
            )
    for name, mask in masks.items():
        param, dead = params[name], ~mask
        assert param is not None
        if isinstance(param, DTensor):
            dead = distribute_tensor(dead, param.device_mesh, param.placements)
        param.masked_fill_(dead.to(param.device), 0.0)


def _bare(name: str) -> str:
    """The name of a parameter without what wrappers of its model have put before it."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def hash_masks(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of masks by name, in their order."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()
