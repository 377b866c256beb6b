"""Pruning from scratch: an architecture from gates on random weights, and then its training.

Source: Wang, Zhang, Xie, Zhou, Su, Zhang and Hu, "Pruning from Scratch", AAAI 2020, arXiv
1909.12579. With g the gates of all features, in [0, 1] and 1 at the start, they first minimise

    L + λ · (mean |g| − r)²

by Adam, over weights that stay as they were drawn. Of the gates so found the largest stay, as many
as a budget allows, and the network of those features is trained from other random weights. Here it
is the whole network with all others shut, which computes the same; removing them makes it small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import again, reached
from sclcore.driver.budget_search import keep_largest, within_budget
from sclcore.driver.gates import (
    GatedMethod,
    adam,
    gate_gradients,
    gated_layers,
    live_of,
    move_latents,
    write_gated,
)
from sclcore.lazy import torch
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sclcore.driver.gates import GatedLayer, Gates
    from sclcore.driver.net import Net


class FromScratch(GatedMethod, frozen=True):
    """Pruning from scratch: gates on random, fixed weights, then training (arXiv 1909.12579)."""

    look: ClassVar = ("#b5a000", "d")
    example: ClassVar = {"density": 0.5, "gate_lr": 0.1, "search_until": 0.5}
    group_keys: ClassVar = ("units", "prices")

    name: Literal["from_scratch"] = Field(
        default="from_scratch",
        description="find features by gates on random weights, then train those anew",
    )
    density: float | None = Field(
        default=None, gt=0, lt=1, description="share of connections that the features may have"
    )
    macs: float | None = Field(
        default=None, gt=0, lt=1, description="share of the MACs, in place of density"
    )
    search_until: float = Field(
        default=0.1, gt=0, lt=1, description="progress at which gates are found and training begins"
    )
    mean_gate: float = Field(
        default=0.5, gt=0, lt=1, description="r, the mean of all gates that is aimed at"
    )
    lam: float = Field(
        default=0.5, ge=0, allow_inf_nan=False, description="λ, the weight of (mean gate − r)²"
    )
    gate_lr: float = Field(
        default=1e-2, gt=0, description="Adam's learning rate of the gates, constant"
    )

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        if (self.density is None) == (self.macs is None):
            raise ValueError("needs density or macs, one of them: the budget of what is trained")
        return self

    def groups(self, model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
        from sclcore.network.connections import weight_uses

        connections, *others = super().groups(model, example)
        prices = [1.0] * len(connections["params"])
        if self.macs is not None:
            uses = weight_uses(model, example)
            prices = [uses.get(name, 0.0) for name, _ in connections["params"]]
        shapes = [tuple(p.shape) for _, p in connections["params"]]
        connections |= {"prices": prices, "shapes": shapes}
        connections["names"] = [name for name, _ in connections["params"]]
        self._check_budget(connections)
        return [connections, *others]

    def _check_budget(self, group: Mapping[str, Any]) -> None:
        sizes = zip(group["names"], group["units"], strict=True)
        ones = {name: torch.ones(units["count"]) for name, units in sizes if units["count"]}
        least = _cost(group, keep_largest(ones, 0)) / _cost(group, ones)
        if least > self._budget:
            key = "density" if self.macs is None else "macs"
            raise ValueError(
                f"{key} {self._budget:g} is less than one feature in each gated layer leaves "
                f"({least:.3g}): raise it, or set joined to gate more layers"
            )

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The features are chosen at the beginning of the first update at `search_until`."""
        return step > 0 and reached((step - 1) / total_steps, self.search_until)

    def lr_progress(self, progress: float) -> float:
        """The training goes through a schedule of its own."""
        return again(progress, [0.0, self.search_until])

    def begin(self, layers: list[GatedLayer]) -> None:
        for layer in layers:
            layer.state["gate"] = layer.filled(1.0)

    def before_update(self, net: Net) -> None:
        layers = gated_layers(net)
        if reached(net.progress, self.search_until) and "chosen" not in layers[0].state:
            self._choose(net, layers)
        write_gated(net, self.shown(net))

    def _choose(self, net: Net, layers: list[GatedLayer]) -> None:
        """Keep the largest gates that fit the budget, and begin with other random weights."""
        group = net.settings
        gates = {each.name: each.state.get("kept_gate", each.state["gate"]) for each in layers}
        cost = functools.partial(_cost, group)
        whole = cost({name: torch.ones_like(gate) for name, gate in gates.items()})
        chosen = within_budget(gates, cost, self._budget * whole)
        for layer in layers:
            layer.state["chosen"] = chosen[layer.name]
        generator = net.random()
        for each, units in zip(net.tensors, group["units"], strict=True):
            weight = each.state["weight"]
            # The same numbers in another order are another draw from whatever they were drawn from.
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
            inputs = units | {"count": 0}
            read = live_of(each.name, tuple(weight.shape), inputs, chosen, weight.device)
            # Fewer inputs; what they feed keeps its variance.
            weight.mul_(math.sqrt(read.numel() / int(read.sum())))

    def step(self, net: Net) -> bool:
        layers = gated_layers(net)
        if "chosen" in layers[0].state:
            gates = self.shown(net)
            move_latents(net, gates, {name: torch.ones_like(gate) for name, gate in gates.items()})
        else:
            self._move_gates(net, layers)
        self.write(net)
        # Weights outside stay as they were drawn while gates are searched for, or have moved.
        return False

    def _move_gates(self, net: Net, layers: list[GatedLayer]) -> None:
        gradients, count = gate_gradients(net), sum(layer.units["count"] for layer in layers)
        mean = sum(float(layer.state["gate"].double().sum()) for layer in layers) / count
        pull = 2 * self.lam * (mean - self.mean_gate) / count
        for layer in layers:
            gate = layer.state["gate"]
            adam(layer.state, "gate", gradients[layer.name] + pull * gate.sign(), self.gate_lr)
            gate.clamp_(0, 1)

    def after_epoch(self, net: Net, results: Mapping[str, float]) -> None:
        """Keep the gates, if few enough are open and no such network did better."""
        layers = gated_layers(net)
        first, top1 = layers[0].state, results["val/top1"]
        if "chosen" in first or _open_share(layers) > self.mean_gate:
            return
        if top1 > first.get("kept_top1", -1.0):
            first["kept_top1"] = top1
            for layer in layers:
                layer.state["kept_gate"] = layer.state["gate"].clone()

    def shown(self, net: Net) -> Gates:
        return {
            layer.name: layer.state.get("chosen", layer.state["gate"])
            for layer in gated_layers(net)
        }

    def metrics(self, net: Net) -> dict[str, float]:
        """The mean gate of each layer, and which share of all is above 0."""
        layers = gated_layers(net)
        means = {f"gates/{layer.name}": float(layer.state["gate"].mean()) for layer in layers}
        return means | {"gates/open": _open_share(layers)}

    @property
    def _budget(self) -> float:
        return self.density if self.density is not None else self.macs or 1.0


def _open_share(layers: list[GatedLayer]) -> float:
    gates = torch.cat([layer.state["gate"] for layer in layers])
    return float((gates > 0).double().mean())


def _cost(group: Mapping[str, Any], gates: Gates) -> float:
    """Connections, or MACs, that are left."""
    keys = ("names", "shapes", "units", "prices")
    device = next(iter(gates.values())).device
    return sum(
        price * int(live_of(name, shape, units, gates, device).sum())
        for name, shape, units, price in zip(*(group[key] for key in keys), strict=True)
    )
