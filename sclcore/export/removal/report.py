"""What was removed and what was not, as numbers and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerChange:
    """Features (inputs, outputs) of one layer before and after.

    `left` counts output features that are constant or unread and stay: reason → number.
    """

    layer: str
    inputs_before: int
    inputs_after: int
    features_before: int
    features_after: int
    left: dict[str, int]


@dataclass(frozen=True)
class RemovalReport:
    """The network before and after.

    `macs` are multiply-accumulates of the layers for the example input, zeros included.

    `difference` is the largest deviation of an output in float64 on one random input, relative to
    the largest output. `problem` says why nothing was removed although features are dead.
    """

    layers: list[LayerChange]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    difference: float
    problem: str = ""

    @property
    def features_before(self) -> int:
        return sum(layer.features_before for layer in self.layers)

    @property
    def features_after(self) -> int:
        return sum(layer.features_after for layer in self.layers)

    @property
    def left(self) -> dict[str, int]:
        """Over all layers: why dead features stay → how many."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for reason, count in layer.left.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {
            "features_before": self.features_before,
            "features_after": self.features_after,
            "left": self.left,
        }
        return {**totals, **asdict(self)}
