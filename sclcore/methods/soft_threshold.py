"""Soft threshold reparameterisation (STR): each layer learns the threshold below which weights die.

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML
2020, arXiv 2002.03231:

    v = sign(w) · relu(|w| − g(s)),   g the sigmoid, one s for each layer
    ∂L/∂w = G ⊙ 1[v ≠ 0]             ∂L/∂s = − g'(s) · Σ G ⊙ sign(w) ⊙ 1[v ≠ 0]

s starts far below 0, where nothing dies, and its weight decay draws it towards 0: that decay and
the start are what sparsity is chosen by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sclcore.driver.latent import move_latent, with_momentum
from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net


class SoftThreshold(DrivenMethod, frozen=True):
    """Soft threshold reparameterisation, one learned threshold per layer (arXiv 2002.03231).

    The latent weights w and the thresholds s are state, `weight` and `threshold`. The thresholds
    move by SGD with the weights' `lr` and `momentum`, also where AdamW moves the weights, then with
    0.9 and in Nesterov's form. Training starts from the model's weights v as they are:
    w = v + sign(v) · g(s_init).
    """

    look: ClassVar = ("#cc79a7", "v")
    example: ClassVar = {"s_init": -5, "s_weight_decay": 0.05}
    started_by: ClassVar = "threshold"

    name: Literal["str"] = Field(default="str", description="learn below which size weights are 0")
    s_init: float = Field(
        allow_inf_nan=False, description="initial s of every layer; the threshold is sigmoid(s)"
    )
    s_weight_decay: float = Field(
        ge=0, allow_inf_nan=False, description="L2 decay of s: the larger, the sparser"
    )

    def start(self, net: Net, fresh: list[Connected]) -> None:
        for each in fresh:
            s = torch.full((), self.s_init, device=each.param.device)
            v = each.param.detach()
            each.state["weight"] = v + v.sign() * s.sigmoid()
            each.state["threshold"], each.state["threshold_momentum"] = s, torch.zeros_like(s)
            _write(each)

    def step(self, net: Net) -> bool:
        masks = self.masks(net)
        for each, mask in zip(net.tensors, masks, strict=True):
            if each.param.grad is not None:
                self._move_threshold(net, each, mask, each.param.grad)
        move_latent(net, masks)
        self.write(net)
        return True

    def _move_threshold(self, net: Net, each: Connected, mask: Tensor, grad: Tensor) -> None:
        s = each.state["threshold"]
        g = s.sigmoid()
        # In double: the sum is over a whole layer.
        total = torch.where(mask, grad * each.state["weight"].sign(), 0.0).double().sum()
        step = self.s_weight_decay * s - (g * (1 - g) * total).to(s.dtype)
        moved = with_momentum(net.settings, each.state["threshold_momentum"], step)
        s.sub_(net.settings["lr"] * moved)

    def masks(self, net: Net) -> list[Tensor]:
        return [each.state["weight"].abs() > _threshold(each) for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            _write(each)

    def take(self, net: Net, each: Connected) -> int:
        v, w = each.param, each.state["weight"]
        changed = v != _effective(each).to(v.dtype)
        w.copy_(torch.where(changed, v + v.sign() * _threshold(each), w))
        return 0

    def metrics(self, net: Net) -> dict[str, float]:
        """The threshold g(s) of each tensor: weights below it are dead."""
        return {f"threshold/{each.name}": float(_threshold(each)) for each in net.tensors}


def _threshold(each: Connected) -> Tensor:
    return each.state["threshold"].sigmoid()


def _effective(each: Connected) -> Tensor:
    """v = sign(w) · relu(|w| − g(s))."""
    w = each.state["weight"]
    return w.sign() * (w.abs() - _threshold(each)).relu()


def _write(each: Connected) -> None:
    each.param.copy_(_effective(each))
