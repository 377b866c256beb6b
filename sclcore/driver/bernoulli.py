"""Gates that are drawn: open with probability π = g(φ), one draw of each for a whole update.

Source: Li and Ji, "L0-ARM: Network Sparsification via Stochastic Binary Optimization", ECML 2019,
arXiv 1904.04432; the estimators are those of Yin and Zhou (ARM), arXiv 1807.11143. With u uniform,
one for each gate, f₂ the loss with the gates 1[u < π] and f₁ with 1[u > 1 − π]:

    ARM   ∂E[f]/∂a = (f₁ − f₂) · (u − ½)        a = log π/(1 − π), and ∂a/∂φ = g'/(π (1 − π)),
    AR    ∂E[f]/∂a = f₂ · (1 − 2u)              which is k for g = σ(kφ)

Both are unbiased. The objective has besides, with n weights to a feature and N gated ones in all,
Σ_layers λ · n/N · Σ π, and under SGD ½ · decay · Σ π ‖row‖².
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sclcore.driver.gates import Gates, adam, gated_layers, per_layer
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Net

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""λ of a layer."""
Curve = Literal["sigmoid", "hard"]
Estimator = Literal["arm", "ar"]
# The hard sigmoid is clip(kφ/7 + ½, 0, 1).
_WIDTH = 7.0
# φ of a gate that is only just likelier to be open than shut, and no question to k = 5000.
_BARELY = 0.01


def probability(phi: Tensor, k: float, curve: Curve) -> Tensor:
    """π = g(φ): σ(kφ), or the hard sigmoid."""
    return torch.sigmoid(k * phi) if curve == "sigmoid" else (k * phi / _WIDTH + 0.5).clamp(0, 1)


def slope(phi: Tensor, k: float, curve: Curve) -> Tensor:
    """g'(φ)."""
    pi = probability(phi, k, curve)
    return k * pi * (1 - pi) if curve == "sigmoid" else (k / _WIDTH) * ((pi > 0) & (pi < 1))


def logit_slope(phi: Tensor, k: float, curve: Curve) -> Tensor:
    """∂a/∂φ, where a is the logit of π; 0 where π no longer moves."""
    pi, rise = probability(phi, k, curve), slope(phi, k, curve)
    if curve == "sigmoid":
        return torch.full_like(phi, k)
    return torch.where(rise > 0, rise / (pi * (1 - pi)), 0.0)


def phi_of(pi: float, k: float, curve: Curve) -> float:
    """The φ of a probability in (0, 1)."""
    return math.log(pi / (1 - pi)) / k if curve == "sigmoid" else _WIDTH * (pi - 0.5) / k


def probabilities(net: Net, k: float, curve: Curve) -> dict[str, Tensor]:
    """π of each gate."""
    return {layer.name: probability(layer.state["phi"], k, curve) for layer in gated_layers(net)}


def uniforms(net: Net) -> dict[str, Tensor]:
    """u of each gate: that of this update, however often it is asked for."""
    layers = gated_layers(net)
    sizes = [layer.units["count"] for layer in layers]
    numbers = torch.rand(sum(sizes), generator=net.random(), dtype=torch.float64).split(sizes)
    return {
        layer.name: u.to(layer.weight.param.device)
        for layer, u in zip(layers, numbers, strict=True)
    }


def drawn(net: Net, pi: Gates, number: int) -> dict[str, Tensor]:
    """The gates of forward pass `number` of this update, 0 or 1."""
    u = uniforms(net)
    return {n: (u[n] < p if number == 0 else u[n] > 1 - p).to(p.dtype) for n, p in pi.items()}


def survivors(pi: Gates, *, scaled: bool) -> dict[str, Tensor]:
    """The gates as evaluated: π where it is ½ or more, or 1 if not `scaled`; else 0."""
    return {
        name: torch.where(p >= 0.5, p if scaled else torch.ones_like(p), 0.0)
        for name, p in pi.items()
    }


def move_gates(
    net: Net,
    *,
    k: float,
    curve: Curve,
    estimator: Estimator,
    lam: float | Mapping[str, float],
    lr: float,
    decays: bool,
) -> None:
    """One update of every φ by Adam. `decays`: φ feels the rows' decay.

    The likeliest feature of a layer stays: without it nothing would pass. Collective: it asks for
    the losses of this update.
    """
    losses, layers, u = net.losses, gated_layers(net), uniforms(net)
    group = net.settings
    # AdamW's decay is no part of an objective.
    decay = group["weight_decay"] if decays and group["weight_rule"] == "sgd" else 0.0
    total = sum(layer.weight.param.numel() for layer in layers)
    prices = per_layer("lam", lam, [layer.name for layer in layers])
    for layer, price in zip(layers, prices, strict=True):
        phi = layer.state["phi"]
        by_logit = estimate(losses, u[layer.name], estimator)
        rows = layer.state["weight"].flatten(1).square().sum(1)
        cost = price * layer.row / total + 0.5 * decay * rows
        grad = by_logit * logit_slope(phi, k, curve) + cost * slope(phi, k, curve)
        adam(layer.state, "phi", grad, lr)
        if not (phi >= 0).any():
            phi[phi.argmax()] = _BARELY
            net.held_layers.append(layer.name)


def regulariser(net: Net, pi: Gates, lam: float | Mapping[str, float]) -> float:
    """What the objective has besides the loss."""
    layers, decay = gated_layers(net), net.settings["weight_decay"]
    total = sum(layer.weight.param.numel() for layer in layers)
    prices = per_layer("lam", lam, [layer.name for layer in layers])
    cost = 0.0
    for layer, price in zip(layers, prices, strict=True):
        rows = layer.state["weight"].flatten(1).square().sum(1)
        cost += float((pi[layer.name] * (price * layer.row / total + 0.5 * decay * rows)).sum())
    return cost


def estimate(losses: Sequence[float | Tensor], u: Tensor, estimator: Estimator) -> Tensor:
    """∂E[f]/∂a of each gate, from the losses of an update's passes."""
    if estimator == "ar":
        return losses[0] * (1 - 2 * u)
    return (losses[1] - losses[0]) * (u - 0.5)
