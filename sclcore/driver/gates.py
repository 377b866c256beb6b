"""Methods with a gate on each feature: what gates multiply is latent, and the parameters are gated.

A gate multiplies the row of a layer's weight and its bias, or, where batch norm follows directly,
its γ and β. With G = ∂L/∂v of the gated v = g · w:

    ∂L/∂w = G ⊙ g          ∂L/∂g = Σ G ⊙ w   over all that the gate multiplies

Between updates, as the network is evaluated and saved, a feature whose gate is 0 is gone: its row
is 0 also where batch norm takes the gate, and so are the columns that certainly read nothing else
(`sclcore.driver.units`). Those are what masks call dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sclcore.driver.net import Connected, Net
    from sclcore.driver.units import Units

Gates = Mapping[str, "Tensor"]
"""Tensor of connections → its gates [features]."""


@dataclass(frozen=True)
class GatedLayer:
    """A layer with gates; what is known of them is in the state of its weight."""

    weight: Connected
    units: Units
    vectors: list[Connected]

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def state(self) -> dict[str, Any]:
        return self.weight.state

    @property
    def multiplied(self) -> list[Connected]:
        """What a gate multiplies in a forward pass."""
        return [self.weight, *self.vectors] if self.units["on_rows"] else self.vectors

    @property
    def row(self) -> int:
        """Weights of one feature."""
        return self.weight.param.numel() // self.units["count"]

    def filled(self, value: float) -> Tensor:
        """A value for each gate [features], in float32 at least."""
        dtype = torch.promote_types(self.weight.param.dtype, torch.float32)
        size, device = (self.units["count"],), self.weight.param.device
        return torch.full(size, value, dtype=dtype, device=device)


class GatedMethod(DrivenMethod, frozen=True):
    """Its gates are state of a layer's weight. A subclass says what they are and how they move."""

    zero_stages: ClassVar = (0,)
    precisions: ClassVar = ("fp32", "autocast")
    started_by: ClassVar[str] = "weight"
    group_keys: ClassVar = ("units",)

    joined: bool = Field(
        default=False,
        description="gates also on features that are added to those of another layer, as in a "
        "residual stream: their weights die, the features cannot be removed",
    )

    def groups(self, model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
        from sclcore.driver.units import find_units

        connections, *others = super().groups(model, example)
        units = find_units(model, example, self.exclude, joined=self.joined)
        self.check({name: each["count"] for name, each in units.items() if each["count"]})
        of_tensors = [units[name] for name, _ in connections["params"]]
        return [connections | {"units": of_tensors}, *others]

    def check(self, features: Mapping[str, int]) -> None:
        """ValueError in one sentence where the settings do not fit layers of so many features."""

    def begin(self, layers: list[GatedLayer]) -> None:
        """Make the state of the gates."""
        raise NotImplementedError

    def shown(self, net: Net) -> Gates:
        """The gates as the network is evaluated and saved."""
        raise NotImplementedError

    def start(self, net: Net, fresh: list[Connected]) -> None:
        vectors = {name for units in net.settings["units"] for name in units["vectors"]}
        for each in (*fresh, *(other for other in net.others if other.name in vectors)):
            each.state["weight"] = each.param.detach().clone()
        self.begin(gated_layers(net))
        self.write(net)

    def masks(self, net: Net) -> list[Tensor]:
        return live(net, self.shown(net))

    def write(self, net: Net) -> None:
        gates = self.shown(net)
        write_gated(net, gates)
        for each, mask in zip(net.tensors, live(net, gates), strict=True):
            each.param.masked_fill_(~mask, 0.0)

    def take(self, net: Net, each: Connected) -> int:
        factor = torch.ones((), device=each.param.device)
        for layer in gated_layers(net):
            if any(each.param is other.param for other in layer.multiplied):
                factor = _along(self.shown(net)[layer.name], each.param)
        alive = (factor != 0).expand(each.param.shape)
        for other, mask in zip(net.tensors, self.masks(net), strict=True):
            alive = mask if other.param is each.param else alive
        weight, values = each.state["weight"], each.param.clone()
        changed = values != torch.where(alive, weight * factor, 0.0).to(values.dtype)
        weight.copy_(torch.where(changed & alive, values / factor, weight))
        each.param.masked_fill_(~alive, 0.0)
        return int((changed & ~alive).sum())


def gated_layers(net: Net) -> list[GatedLayer]:
    """All layers that have gates, in the order of the groups."""
    others = {each.name: each for each in net.others}
    return [
        GatedLayer(each, units, [others[name] for name in units["vectors"]])
        for each, units in zip(net.tensors, net.settings["units"], strict=True)
        if units["count"]
    ]


def write_gated(net: Net, gates: Gates) -> None:
    """Set the parameters to what a forward pass with these gates computes with."""
    for each in net.tensors:
        each.param.copy_(each.state["weight"])
    for layer in gated_layers(net):
        for each in layer.multiplied:
            each.param.copy_(each.state["weight"] * _along(gates[layer.name], each.param))


def live(net: Net, gates: Gates) -> list[Tensor]:
    """Which connections of each tensor live: not the rows of shut features, nor their columns."""
    return [
        live_of(each.name, tuple(each.param.shape), units, gates, each.param.device)
        for each, units in zip(net.tensors, net.settings["units"], strict=True)
    ]


def live_of(
    name: str, shape: tuple[int, ...], units: Units, gates: Gates, device: Any = "cpu"
) -> Tensor:
    """The same of one tensor, known by its shape."""
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if units["count"]:
        mask &= _along(gates[name] != 0, mask)
    for source, block in units["columns"]:
        read = (gates[source] != 0).repeat_interleave(block)
        # The columns of a group of a convolution are those of its own inputs.
        columns = mask.view(units["groups"], -1, *mask.shape[1:])
        columns &= read.view(units["groups"], 1, -1, *[1] * (mask.ndim - 2))
    return mask


def move_latents(net: Net, gates: Gates, keep: Gates) -> None:
    """One update of all weights by their groups' rules, from gradients of what `gates` gated.

    Of the decay, the row of a feature feels the share `keep` [features] that is in the objective,
    ½ · decay · Σ keep · ‖row‖². The parameters hold latent weights afterwards.
    """
    group, layers = net.settings, gated_layers(net)
    latent = [*net.tensors, *(vector for layer in layers for vector in layer.vectors)]
    for layer in layers:
        for each in layer.multiplied:
            if each.param.grad is not None:
                each.param.grad.mul_(_along(gates[layer.name], each.param))
    for each in latent:
        each.param.copy_(each.state["weight"])
    spared = [
        group["weight_decay"] * (1 - _along(keep[layer.name], each.param)) * each.param
        for layer in layers
        for each in [layer.weight]
    ]
    # SGD's rule adds decay · w to the gradient, AdamW's takes lr · decay · w off the weight.
    coupled = group["weight_rule"] == "sgd"
    for layer, amount in zip(layers, spared, strict=True):
        if coupled and layer.weight.param.grad is not None:
            layer.weight.param.grad.sub_(amount)
    net.move(torch.ones((), dtype=torch.bool, device=each.param.device) for each in net.tensors)
    net.move_others()
    for layer, amount in zip(layers, spared, strict=True):
        if not coupled and layer.weight.param.grad is not None:
            layer.weight.param.add_(amount, alpha=group["lr"])
    for each in latent:
        each.state["weight"].copy_(each.param)


def gate_gradients(net: Net) -> dict[str, Tensor]:
    """∂L/∂g = Σ G ⊙ w of each gate [features], from gradients of gated parameters."""
    found = {}
    for layer in gated_layers(net):
        total = layer.filled(0.0)
        for each in layer.multiplied:
            if each.param.grad is not None:
                products = each.param.grad * each.state["weight"]
                total += products.view(layer.units["count"], -1).sum(1)
        found[layer.name] = total
    return found


def per_layer(option: str, value: float | Mapping[str, float], names: Iterable[str]) -> list[float]:
    """The value of an option for each layer: one for all, or that of the last pattern that matches.

    Raises ValueError where a layer has none, or a pattern matches no layer with gates.
    """
    from sclcore.network.layers import matches

    if not isinstance(value, Mapping):
        return [value for _ in names]
    found, matched = [], set()
    for name in names:
        own = (name, name.removesuffix(".weight"))
        hits = [p for p in value if any(matches(p, each) for each in own)]
        if not hits:
            raise ValueError(
                f"{option} has no value for the layer {own[1]}: add it, or '*' for all"
            )
        matched.update(hits)
        found.append(value[hits[-1]])
    unmatched = [pattern for pattern in value if pattern not in matched]
    if unmatched:
        raise ValueError(f"{option} pattern {unmatched[0]!r} matches no layer with gates")
    return found


def adam(state: dict[str, Any], key: str, grad: Tensor, lr: float) -> None:
    """One update of `state[key]` by Adam, whose averages and count are kept beside it."""
    from sclcore.optim.rules import step_dense

    value = state[key]
    kept = [f"{key}_{name}" for name in ("exp_avg", "exp_avg_sq")]
    moments = {name[len(key) + 1 :]: state[name] for name in kept if name in state}
    value.grad = grad.to(value.dtype)
    group = {
        "params": [value],
        "weight_rule": "adamw",
        "lr": lr,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "updates": state.get(f"{key}_updates", 0),
    }
    step_dense(group, {value: moments})
    value.grad = None
    state.update({f"{key}_{name}": moment for name, moment in moments.items()})
    state[f"{key}_updates"] = group["updates"]


def _along(gates: Tensor, tensor: Tensor) -> Tensor:
    """Gates [features] as factors of a tensor [features, …]."""
    return gates.view(-1, *[1] * (tensor.ndim - 1))
