"""L0-ARM and L0-AR: gates on features are drawn, and it is learned how likely each is to open.

Source: Li and Ji, "L0-ARM: Network Sparsification via Stochastic Binary Optimization", ECML 2019,
arXiv 1904.04432. The estimators are in `sclcore.driver.bernoulli`; docs/methods.md says what here
is theirs and what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sclcore.driver.bernoulli import (
    Price,
    drawn,
    move_gates,
    phi_of,
    probabilities,
    survivors,
)
from sclcore.driver.gates import GatedMethod, move_latents, per_layer, write_gated

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.gates import GatedLayer, Gates
    from sclcore.driver.net import Net

Share = Annotated[float, Field(gt=0, lt=1)]


class L0(GatedMethod, frozen=True):
    """L0-ARM or L0-AR: stochastic binary gates on features (arXiv 1904.04432)."""

    look: ClassVar = ("#8a6d3b", "<")
    example: ClassVar = {"lam": 3, "gate_lr": 0.02, "keep": 0.7}

    name: Literal["l0"] = Field(
        default="l0", description="draw gates on features and learn how likely each is to open"
    )
    lam: Price | dict[str, Price] = Field(
        description="what all gated weights together cost, in units of the loss: a number, or "
        "patterns of layers with numbers"
    )
    estimator: Literal["arm", "ar"] = Field(
        default="arm",
        description="of the gates' gradient; arm: a second forward pass, ar: none, more noise",
    )
    curve: Literal["sigmoid", "hard"] = Field(
        default="sigmoid", description="from φ to the probability π; hard: it reaches 0 and 1"
    )
    k: float = Field(default=7.0, gt=0, description="steepness of the curve")
    keep: Share | dict[str, Share] = Field(
        default=0.9,
        description="probability of a gate to be open at the start: a number, or patterns of "
        "layers with numbers",
    )
    gate_lr: float = Field(default=1e-3, gt=0, description="Adam's learning rate of φ, constant")
    scale_survivors: bool = Field(
        default=True, description="evaluate the features that stay times π; false: times 1"
    )

    @property
    def update_cost(self) -> float:
        return 4 / 3 if self.estimator == "arm" else 1.0

    def check(self, features: Mapping[str, int]) -> None:
        for option, value in (("lam", self.lam), ("keep", self.keep)):
            per_layer(option, value, features)

    def begin(self, layers: list[GatedLayer]) -> None:
        keep = per_layer("keep", self.keep, [layer.name for layer in layers])
        for layer, share in zip(layers, keep, strict=True):
            layer.state["phi"] = layer.filled(phi_of(share, self.k, self.curve))

    def passes(self, net: Net) -> int:
        return 2 if self.estimator == "arm" else 1

    def before_update(self, net: Net) -> None:
        self.before_pass(net, 0)

    def before_pass(self, net: Net, number: int) -> None:
        write_gated(net, drawn(net, self._pi(net), number))

    def step(self, net: Net) -> bool:
        pi = self._pi(net)
        move_gates(
            net,
            k=self.k,
            curve=self.curve,
            estimator=self.estimator,
            lam=self.lam,
            lr=self.gate_lr,
            decays=True,
        )
        move_latents(net, drawn(net, pi, 0), pi)
        self.write(net)
        return False

    def shown(self, net: Net) -> Gates:
        return survivors(self._pi(net), scaled=self.scale_survivors)

    def metrics(self, net: Net) -> dict[str, float]:
        """The expected share of open gates of each layer."""
        return {f"gates/{name}": float(pi.mean()) for name, pi in self._pi(net).items()}

    def _pi(self, net: Net) -> dict[str, Tensor]:
        return probabilities(net, self.k, self.curve)
