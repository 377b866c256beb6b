"""SCL as an optimizer: the masks, the latent weights and their momenta are optimizer state.

The module's parameter is the effective weight v = w ⊙ H(m), zeros included, so the model stays
plain PyTorch and `p.grad` is G = ∂L/∂v. Whatever averages G over ranks (DDP, DeepSpeed) has thereby
averaged both gradients exactly, since w and m are the same everywhere:

    ∂L/∂w = G ⊙ H(m)          ∂L/∂m = G ⊙ w ⊙ φ'(m)

and normalisation, which is not linear, comes after that average. Source: Tang et al.,
"Automatic Sparse Connectivity Learning for Neural Networks", arXiv 2201.05020.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from sclcore.connections import feature_view
from sclcore.step import get_proxy, unit_step

NORMALIZATIONS = ("feature", "layer", "none")

# Below this a feature's gradient is nothing but zeros: it only keeps 0 / 0 from being NaN.
_EPS = 1e-12


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


class SCL(Optimizer):
    """Sparse Connectivity Learning, with SGD for the weights and for the mask variables.

        optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)

    Works in a plain loop and under DDP as any optimizer does. Groups with `connections: True` (made
    by `connection_groups`) learn their masks; the others get plain SGD with momentum.

    Args:
        params: parameter groups; plain lists are accepted, but at least one group must be of
            connections.
        lr: learning rate of the weights.
        lam: λ, the cost of one connection, in units of the normalised mask gradient (whose rms
            over a feature is 1).
        mask_lr: learning rate of the mask variables; 0 freezes them. The step that a steady
            gradient of 1 causes is `mask_lr / (1 - mask_momentum)`.
        momentum, mask_momentum: classical momentum, without dampening.
        nesterov: Nesterov's form for the weights.
        weight_decay: L2 decay of the latent weights w and of dense parameters.
        proxy: derivative that stands in for that of the unit step (`sclcore.step.PROXIES`).
        normalize: what the mask gradient is divided by: its rms over the output `feature` (the
            paper), over the `layer`, or `none`.
        mask_init: initial value of every mask variable.
        min_connections: each layer keeps at least that many; the best-scored ones stay.

    State per connection tensor, all of the tensor's shape: `weight` (w), `mask` (m),
    `momentum_buffer`, `mask_momentum_buffer`; kept in float32 for parameters of lower precision.

    A step whose gradient is not finite changes nothing and is counted in `skipped_steps`.
    After each step `grad_norm` holds the 2-norm of G over all parameters, and `held_layers` the
    names of the layers that `min_connections` kept from dying in that step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        lam: float,
        *,
        mask_lr: float = 1e-3,
        momentum: float = 0.9,
        mask_momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        proxy: str = "identity",
        normalize: str = "feature",
        mask_init: float = 1.0,
        min_connections: int = 1,
    ) -> None:
        defaults = {
            "lr": lr,
            "lam": lam,
            "mask_lr": mask_lr,
            "momentum": momentum,
            "mask_momentum": mask_momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "proxy": proxy,
            "normalize": normalize,
            "mask_init": mask_init,
            "min_connections": min_connections,
            "connections": False,
        }
        self.skipped_steps = 0
        self.grad_norm = math.nan
        self.held_layers: list[str] = []
        self.observing = False
        self.observations: dict[str, Observation] = {}
        super().__init__(params, defaults)
        if not any(group["connections"] for group in self.param_groups):
            raise ValueError(
                "no parameter group holds connections: pass connection_groups(model), not "
                "model.parameters()"
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("skipped_steps", "grad_norm", "observing", "held_layers", "observations")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("skipped_steps", 0), ("grad_norm", math.nan), ("observing", False)):
            self.__dict__.setdefault(name, value)
        self.__dict__.setdefault("held_layers", [])
        self.__dict__.setdefault("observations", {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with `connections: True` its tensors start with every connection live."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["connections"]:
            size = len(group["params"])
            group.setdefault("costs", [1.0] * size)
            group.setdefault("transposed_groups", [0] * size)
            first = sum(len(g["params"]) for g in self.param_groups[:-1])
            numbers = [f"param{first + i}" for i in range(size)]
            # Not "param_names": torch wants that in all groups or in none.
            group.setdefault("names", group.get("param_names", numbers))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but latent state keeps its own precision where the parameter has less.

        The parameters themselves are set to w ⊙ H(m), so that model and masks always agree.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, params, strict=True):
            for key, value in saved.get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
        for _, p in self._connections():
            if "mask" in (state := self.state[p]):
                p.detach().copy_(torch.where(unit_step(state["mask"]), state["weight"], 0.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradient_is_finite():
            self.skipped_steps += 1
            return loss
        self.held_layers = []
        for group in self.param_groups:
            if group["connections"]:
                for index, p in enumerate(group["params"]):
                    if p.grad is not None:
                        self._step_connections(group, index, p)
            else:
                self._step_dense(group)
        return loss

    def masks(self) -> dict[str, Tensor]:
        """Which connections are live: parameter name → bool tensor of the parameter's shape."""
        return {
            name: unit_step(self.state[p]["mask"])
            if "mask" in self.state[p]
            else torch.ones_like(p, dtype=torch.bool)
            for name, p in self._connections()
        }

    def mask_variables(self) -> dict[str, Tensor]:
        """The mask variables m by parameter name; empty before the first step."""
        return {n: self.state[p]["mask"] for n, p in self._connections() if "mask" in self.state[p]}

    def mask_hash(self) -> str:
        """SHA-256 of all masks: equal on all ranks, and in two runs that chose the same network."""
        digest = hashlib.sha256()
        for name, mask in self.masks().items():
            digest.update(name.encode())
            digest.update(mask.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _connections(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            if group["connections"]:
                yield from zip(group["names"], group["params"], strict=True)

    def _gradient_is_finite(self) -> bool:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return True
        if any(g.is_sparse for g in grads):
            raise RuntimeError("SCL does not support sparse gradients (an Embedding's, say)")
        self.grad_norm = float(torch.nn.utils.get_total_norm(grads))
        return math.isfinite(self.grad_norm)

    def _step_dense(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        _sgd(group, params, [p.grad for p in params], buffers)
        for p, buffer in zip(params, buffers, strict=True):
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer

    def _step_connections(self, group: dict[str, Any], index: int, p: Tensor) -> None:
        state = self.state[p] or self._start(group, p)
        weight = state["weight"]
        grad = p.grad.to(weight.dtype)  # type: ignore[union-attr]
        live = unit_step(state["mask"])
        # Both gradients are taken at the present w and m, before either of them moves.
        weight_grad = torch.where(live, grad, 0.0)
        mask_grad = grad * weight if group["mask_lr"] else None
        buffers = [state.get("momentum_buffer")]
        _sgd(group, [weight], [weight_grad], buffers)
        if buffers[0] is not None:
            state["momentum_buffer"] = buffers[0]
        if mask_grad is not None:
            live = self._step_mask(group, index, state, mask_grad, live)
        p.detach().copy_(torch.where(live, weight, 0.0))

    def _step_mask(
        self,
        group: dict[str, Any],
        index: int,
        state: dict[str, Tensor],
        mask_grad: Tensor,
        live: Tensor,
    ) -> Tensor:
        """m ← m − lr_m · momentum(ĝ + λ · c · φ'(m)), with ĝ the normalised ∂L/∂m.

        Takes G ⊙ w, which it overwrites, and H(m) before the step; returns H(m) after it.
        """
        mask, name = state["mask"], group["names"][index]
        if "mask_momentum_buffer" not in state:
            state["mask_momentum_buffer"] = torch.zeros_like(mask)
        buffer = state["mask_momentum_buffer"].mul_(group["mask_momentum"])
        derivative = get_proxy(group["proxy"]).derivative
        slope = derivative(mask) if derivative else None
        if slope is not None:
            mask_grad.mul_(slope)
        view, dims = feature_view(mask.shape, group["transposed_groups"][index])
        by_feature = mask_grad.view(view)
        rms = _rms(by_feature, dims)
        divisor = _divisor(group["normalize"], rms)
        if divisor is None:
            buffer.add_(mask_grad)
        else:
            buffer.view(view).addcdiv_(by_feature, divisor)
        price = group["lam"] * group["costs"][index]
        if slope is None:
            buffer.add_(price)
        else:
            buffer.add_(slope, alpha=price)
        mask.add_(buffer, alpha=-group["mask_lr"])
        now = unit_step(mask)
        if int(torch.count_nonzero(now)) < min(group["min_connections"], mask.numel()):
            now = _keep_best(group["min_connections"], mask)
            self.held_layers.append(name)
        if self.observing:
            after = rms if divisor is None else rms / divisor
            flips, revivals = int((now != live).sum()), int((now & ~live).sum())
            self.observations[name] = Observation(flips, revivals, rms.flatten(), after.flatten())
        return now

    def _start(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["weight"] = p.detach().to(dtype, copy=True)
        state["mask"] = torch.full_like(state["weight"], group["mask_init"])
        return state


def _sgd(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
) -> None:
    if params:
        sgd(
            params,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )


def _rms(by_feature: Tensor, dims: list[int]) -> Tensor:
    """Root mean square of each feature, kept in the shape of the view."""
    count = math.prod(by_feature.shape[d] for d in dims)
    norm = (
        torch.linalg.vector_norm(by_feature, dim=dims, keepdim=True) if dims else by_feature.abs()
    )
    return norm / math.sqrt(count)


def _divisor(normalize: str, rms: Tensor) -> Tensor | None:
    """What the mask gradient is divided by; `rms` is that of each feature."""
    if normalize == "none":
        return None
    return (rms if normalize == "feature" else rms.square().mean().sqrt()) + _EPS


def _keep_best(count: int, mask: Tensor) -> Tensor:
    """Raise the best `count` mask variables above 0; returns H(m)."""
    best = torch.unravel_index(mask.flatten().topk(min(count, mask.numel())).indices, mask.shape)
    mask[best] = mask[best].clamp(min=torch.finfo(mask.dtype).tiny)
    return unit_step(mask)


def _validate(group: dict[str, Any]) -> None:
    """ValueError with one sentence where an option is out of its range."""
    for name in ("lr", "lam", "mask_lr", "weight_decay", "min_connections"):
        if not group[name] >= 0 or math.isinf(group[name]):
            raise ValueError(f"{name} must be 0 or more and finite, not {group[name]}")
    for name in ("momentum", "mask_momentum"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {group[name]}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs a momentum above 0")
    if not math.isfinite(group["mask_init"]) or group["mask_init"] <= 0:
        raise ValueError(
            f"mask_init must be above 0, so that training starts dense, not {group['mask_init']}"
        )
    if group["normalize"] not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise ValueError(f"unknown normalize {group['normalize']!r}: choose one of {known}")
    get_proxy(group["proxy"])
    for name in ("costs", "transposed_groups", "param_names"):
        if name in group and len(group[name]) != len(group["params"]):
            raise ValueError(f"{name} must have one entry per parameter of its group")
