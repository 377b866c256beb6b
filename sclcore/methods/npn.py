"""Neural plasticity networks: gates that are drawn while one number lets them, pruned or grown.

Source: Li and Ji, "Neural Plasticity Networks", IJCNN 2021, arXiv 1908.08118. Gates and estimator
are those of L0-ARM (`sclcore.driver.bernoulli`), and k alone makes three stages: at 5000 a gate is
open or shut and the network trains as any other; at 7 gates are drawn and learn; at 5000 again they
have settled and the weights with them. docs/methods.md says what is theirs and what is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import reached
from sclcore.driver.bernoulli import (
    Price,
    drawn,
    move_gates,
    probabilities,
    regulariser,
    survivors,
)
from sclcore.driver.gates import (
    GatedMethod,
    gated_layers,
    move_latents,
    per_layer,
    write_gated,
)
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.gates import GatedLayer, Gates
    from sclcore.driver.net import Net

_HARD = 5000.0
# kφ of features that the network begins with, and of those there is only room for.
_OPEN, _SHUT = 3.0, -40.0


class NPN(GatedMethod, frozen=True):
    """Neural plasticity networks: gates that learn in the middle of a run (arXiv 1908.08118)."""

    look: ClassVar = ("#7f3c8d", ">")
    example: ClassVar = {"lam": 5, "gate_lr": 0.03, "grow": True, "init_size": 0.8}

    name: Literal["npn"] = Field(
        default="npn", description="train, prune or grow features by drawn gates, settle"
    )
    lam: Price | dict[str, Price] = Field(
        description="what all gated weights together cost, in units of the loss: a number, or "
        "patterns of layers with numbers; 0 with grow is the usual choice"
    )
    k: float = Field(default=7.0, gt=0, description="steepness of σ(kφ) while gates learn")
    learn_from: float = Field(default=0.2, ge=0, lt=1, description="progress at which gates begin")
    learn_until: float = Field(
        default=0.8, gt=0, le=1, description="progress from which they no longer change"
    )
    init_size: float = Field(
        default=1.0, gt=0, le=1, description="share of a layer's features that it begins with"
    )
    grow: bool = Field(
        default=False,
        description="add a feature to each layer after an epoch with the least validation loss so "
        "far, while gates learn; needs room, by init_size below 1",
    )
    fill: float = Field(
        default=0.0, allow_inf_nan=False, description="log-odds of a new feature to be open"
    )
    gate_lr: float = Field(default=1e-3, gt=0, description="Adam's learning rate of φ, constant")
    scale_survivors: bool = Field(
        default=True,
        description="evaluate the features that stay times π, 1 in the end; false: times 1",
    )

    @model_validator(mode="after")
    def _learns_at_all(self) -> Self:
        if self.learn_from >= self.learn_until:
            raise ValueError(f"learn_from must lie below learn_until, which is {self.learn_until}")
        return self

    @property
    def update_cost(self) -> float:
        """A further forward pass while gates learn."""
        return 1 + (self.learn_until - self.learn_from) / 3

    def check(self, features: Mapping[str, int]) -> None:
        per_layer("lam", self.lam, features)
        if self.grow and all(self._first_size(count) == count for count in features.values()):
            raise ValueError(
                f"grow needs room, and with init_size {self.init_size:g} every layer begins with "
                "all of its features: lower init_size, or widen the model"
            )

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return reached(step / total_steps, self.learn_until)

    def begin(self, layers: list[GatedLayer]) -> None:
        layers[0].state["learning"] = False
        for layer in layers:
            size = layer.state["size"] = self._first_size(layer.units["count"])
            phi = layer.state["phi"] = layer.filled(_OPEN / self.k)
            phi[size:] = _SHUT / self.k

    def passes(self, net: Net) -> int:
        return 2 if self._is_learning(net) else 1

    def before_update(self, net: Net) -> None:
        # Kept, since progress is not known yet where a run goes on with an evaluation.
        gated_layers(net)[0].state["learning"] = self._is_learning(net)
        self.before_pass(net, 0)

    def before_pass(self, net: Net, number: int) -> None:
        write_gated(net, drawn(net, self._pi(net), number))

    def step(self, net: Net) -> bool:
        pi = self._pi(net)
        if self._is_learning(net):
            move_gates(
                net,
                k=self.k,
                curve="sigmoid",
                estimator="arm",
                lam=self.lam,
                lr=self.gate_lr,
                decays=False,
            )
        move_latents(net, drawn(net, pi, 0), pi)
        self.write(net)
        return False

    def after_epoch(self, net: Net, results: Mapping[str, float]) -> None:
        """Give each layer that is full one more feature, if the network was never better."""
        layers, pi = gated_layers(net), self._pi(net)
        if not self.grow or not layers[0].state["learning"]:
            return
        loss = results["val/loss"] + regulariser(net, pi, self.lam)
        if loss >= layers[0].state.get("best_loss", math.inf):
            return
        layers[0].state["best_loss"] = loss
        for layer in layers:
            size, used = layer.state["size"], int((pi[layer.name] >= 0.5).sum())
            if used >= size and size < layer.units["count"]:
                layer.state["phi"][size] = self.fill / self.k
                layer.state["size"] = size + 1
        self.write(net)

    def shown(self, net: Net) -> Gates:
        return survivors(self._pi(net), scaled=self.scale_survivors)

    def metrics(self, net: Net) -> dict[str, float]:
        """The expected share of open gates of each layer."""
        return {f"gates/{name}": float(pi.mean()) for name, pi in self._pi(net).items()}

    def _is_learning(self, net: Net) -> bool:
        begun = reached(net.progress, self.learn_from)
        return begun and not reached(net.progress, self.learn_until)

    def _pi(self, net: Net) -> dict[str, Tensor]:
        learning = gated_layers(net)[0].state["learning"]
        return probabilities(net, self.k if learning else _HARD, "sigmoid")

    def _first_size(self, features: int) -> int:
        return max(1, round(self.init_size * features))
