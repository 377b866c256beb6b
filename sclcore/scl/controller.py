"""A given share of the connections, reached on a course and met exactly when the masks freeze.

The share that may live follows a course: all of it until a quarter of the mask phase, then falling
by a cubic law to the target at four fifths, where it stays while connections still change places.
After each update all mask variables are lowered together by as much as it takes for no more than
that share to live (`SCL.limit_share`). That is what λ does, with the one difference that nothing is
left to chance: λ is the multiplier of the bound on the number of connections, worked out at each
update in place of being chosen. A λ that follows the course by steering lets too many die at one
moment and too few at the next, and where few connections are left, paths through the network are
lost so.

When masks freeze, exactly so many connections are kept, those with the highest mask variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sclcore.courses import cubic_density
from sclcore.scl.optimizer import SCL

_BEGIN, _END = 0.25, 0.8


@dataclass(frozen=True)
class Steering:
    """What a run remembers of its course."""

    lam: float = 0.0
    """The λ that would have moved the mask variables as far as they were lowered last."""
    is_final: bool = False
    """Whether exactly so many connections as wanted have been kept."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Steering:
        """What a checkpoint holds, of an older version as well."""
        return cls(saved["lam"], saved.get("is_final", False))


def wanted(travel: float, target: float) -> float:
    """The share of the connections that may live."""
    return cubic_density(travel, final=target, begin=_BEGIN, end=_END)


class TargetController:
    """Limits what lives of `optimizer`, so that a share `target` of the connections stays, exactly.

    `target` is the share of Σ weight · connections that is live when the masks freeze, in (0, 1);
    `weights` says what one connection of each tensor counts, by name: 1 for a density, its uses per
    forward pass for MACs (`weight_uses`).

    The state is the caller's to keep (`Steering`), so that a checkpoint can hold it.
    """

    def __init__(self, optimizer: SCL, *, target: float, weights: Mapping[str, float]) -> None:
        [self._group] = [group for group in optimizer.param_groups if group["connections"]]
        self._optimizer, self.target = optimizer, target
        self._weights = {name: weights[name] for name in self._group["names"]}
        self._sizes = [math.prod(shape) for shape in self._group["shapes"]]

    def steer(self, travel: float, before: Steering) -> Steering:
        """Set the limit of the next update; at a `travel` of 1 make the choice. Collective.

        `travel` is the share of all movement of masks that lies behind it.
        """
        if before.is_final:
            return before
        if travel >= 1:
            self._optimizer.limit_share(None)
            self._optimizer.keep_share(self.target, self._weights)
            return Steering(before.lam, is_final=True)
        self._optimizer.limit_share(wanted(travel, self.target), self._weights)
        lowered, mask_lr = self._optimizer.lowered, self._group["mask_lr"]
        if lowered is None or not mask_lr:
            return before
        return Steering(lowered * (1 - self._group["mask_momentum"]) / mask_lr)

    def reached(self) -> float:
        """The share that is live now, exactly. Collective where state is sharded."""
        live = self._optimizer.live_connections()
        weighted = zip(self._weights.items(), self._sizes, strict=True)
        have = total = 0.0
        for (name, weight), size in weighted:
            have, total = have + weight * live[name], total + weight * size
        return have / total
