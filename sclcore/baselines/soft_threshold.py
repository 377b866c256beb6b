"""Soft threshold reparameterisation (STR): each layer learns the threshold below which weights die.

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML
2020, arXiv 2002.03231:

    v = sign(w) · relu(|w| − g(s)),   g the sigmoid, one s for each layer
    ∂L/∂w = G ⊙ 1[v ≠ 0]             ∂L/∂s = − g'(s) · Σ G ⊙ sign(w) ⊙ 1[v ≠ 0]

s starts far below 0, where nothing dies, and its weight decay draws it towards 0: that decay and
the start are what sparsity is chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sclcore.baselines.base import Baseline, Connected
from sclcore.weights import IDLE


class SoftThreshold(Baseline):
    """STR, with the latent weights w and the thresholds s as optimizer state.

    `params` are parameter groups made by `connection_groups`; `lr` and the settings of the weights
    (`momentum`, `nesterov`, `weight_decay`, `weight_rule`, `betas`, `eps`) are those of `SCL`, for
    w and dense parameters. The thresholds s move by SGD with the same `lr` and `momentum`, whatever
    moves the weights. All begin at `s_init`, with g(s_init) small beside the weights, and have an
    L2 decay of their own, `s_weight_decay`: the larger, the sparser.

    Training starts from the model's weights v as they are: w = v + sign(v) · g(s_init).

    State per tensor of connections: `weight` (w) and the buffers of its rule, of the tensor's
    shape; `threshold` (s) and `threshold_momentum`, one number each.
    """

    # The thresholds have momentum whatever moves the weights.
    _idle: ClassVar[Mapping[str, tuple[str, ...]]] = {"sgd": IDLE["sgd"]}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        s_init: float,
        s_weight_decay: float,
        **weights: Any,
    ) -> None:
        rule = {"s_init": s_init, "s_weight_decay": s_weight_decay}
        super().__init__(params, lr, rule, **weights)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not math.isfinite(group["s_init"]):
            raise ValueError(f"s_init must be finite, not {group['s_init']}")
        if not 0 <= group["s_weight_decay"] < math.inf:
            raise ValueError(
                f"s_weight_decay must be 0 or more and finite, not {group['s_weight_decay']}"
            )

    def masks(self) -> dict[str, Tensor]:
        return {each.name: _live(each) for each in self._connections()}

    @torch.no_grad()
    def write_weights(self) -> None:
        for each in self._connections():
            _write(each)

    def thresholds(self) -> dict[str, float]:
        """g(s) of each tensor: weights below it are dead."""
        return {each.name: float(each.state["threshold"].sigmoid()) for each in self._connections()}

    def _take_values(self, each: Connected) -> int:
        v, w = each.param, each.state["weight"]
        changed = v != _effective(each).to(v.dtype)
        w.copy_(torch.where(changed, v + v.sign() * each.state["threshold"].sigmoid(), w))
        return 0

    def _has_started(self, state: dict[str, Any]) -> bool:
        return "threshold" in state

    def _start(self, connections: list[Connected]) -> None:
        for each in connections:
            if "threshold" in each.state:
                continue
            s = torch.full((), self._first["s_init"], device=each.param.device)
            v = each.param.detach()
            each.state["weight"] = v + v.sign() * s.sigmoid()
            each.state["threshold"], each.state["threshold_momentum"] = s, torch.zeros_like(s)
            _write(each)

    def _step_connections(self, connections: list[Connected]) -> bool:
        masks = [_live(each) for each in connections]
        for each, mask in zip(connections, masks, strict=True):
            if each.param.grad is not None:
                self._move_threshold(each, mask, each.param.grad)
            each.param.copy_(each.state["weight"])
        self._move_weights(masks)
        for each in connections:
            each.state["weight"].copy_(each.param)
            _write(each)
        return True

    def _move_threshold(self, each: Connected, mask: Tensor, grad: Tensor) -> None:
        group, s, momentum = (
            self._first,
            each.state["threshold"],
            each.state["threshold_momentum"],
        )
        g = s.sigmoid()
        # In double: the sum is over a whole layer.
        total = torch.where(mask, grad * each.state["weight"].sign(), 0.0).double().sum()
        step = group["s_weight_decay"] * s - (g * (1 - g) * total).to(s.dtype)
        momentum.mul_(group["momentum"]).add_(step)
        s.sub_(
            group["lr"] * (step + group["momentum"] * momentum if group["nesterov"] else momentum)
        )


def _live(each: Connected) -> Tensor:
    return each.state["weight"].abs() > each.state["threshold"].sigmoid()


def _effective(each: Connected) -> Tensor:
    """v = sign(w) · relu(|w| − g(s))."""
    w = each.state["weight"]
    return w.sign() * (w.abs() - each.state["threshold"].sigmoid()).relu()


def _write(each: Connected) -> None:
    each.param.copy_(_effective(each))
