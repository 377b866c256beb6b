"""λ that is steered, so that a given share of the connections is left when the masks freeze.

The share that should live follows a course: all of it until a quarter of the mask phase, then
falling by a cubic law to the target at four fifths, where it stays while connections still change
places. At each of a hundred moments λ becomes what brings the right mask variables to 0 a moment
later: with s = mask_lr / (1 - mask_momentum), a mask variable moves by -s · (ĝ + λ · c) per update,
so the quantile that parts those that should live from those that should not falls by s · λ. What
momentum has still to add of the λ before is counted as if it were there already. Nothing is tuned
per network: the gain of the plant is s, which is known.

When masks freeze, exactly so many connections are kept, those with the highest mask variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sclcore.courses import cubic_density
from sclcore.scl.optimizer import SCL

_BEGIN, _END = 0.25, 0.8
_ACTS = 100
_SAMPLE = 1_000_000
# Before connections die, the lowest hundredth of the mask variables says where all of them are.
_MOST = 0.99


@dataclass(frozen=True)
class Steering:
    """What the controller remembers: λ, the travel of its last act, and the λ in momentum then."""

    lam: float
    travel: float = 0.0
    late: float = 0.0
    """What λ has added to the momentum of mask variables: the λ of late."""
    is_final: bool = False
    """Whether exactly so many connections as wanted have been kept."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Steering:
        """What a checkpoint holds; of one from before this law, λ goes on from where it was."""
        if "late" not in saved:
            return cls(saved["lam"], saved["travel"], saved["lam"])
        return cls(**saved)


@dataclass(frozen=True)
class Plant:
    """How mask variables answer to λ, in travel: the share of all movement they will make."""

    start: float
    """Where they begin: mask_init."""
    reach: float
    """How far a λ of 1 takes them over the whole travel."""
    memory: float
    """The travel over which momentum keeps going: momentum / (1 - momentum) updates."""

    def next(self, before: Steering, travel: float, then: float, quantile: float) -> Steering:
        """λ from `travel` on; `quantile` is the one that should be at 0 `then`.

        Before connections die it is brought down evenly from where it began.
        """
        late = self._late(before, travel)
        aim = self.start * max(0.0, 1 - then / _BEGIN)
        missing = quantile - aim - self.reach * self.memory * late
        lam = max(0.0, missing / (self.reach * (then - travel)))
        return Steering(lam, travel, late)

    def _late(self, before: Steering, travel: float) -> float:
        if not self.memory:
            return 0.0
        # momentum^n over n updates; e^(-1 / memory) is that for one update's travel, nearly.
        kept = math.exp(-(travel - before.travel) / self.memory)
        return before.lam + (before.late - before.lam) * kept


def wanted(travel: float, target: float) -> float:
    """The share of the connections that should live."""
    return cubic_density(travel, final=target, begin=_BEGIN, end=_END)


def share_above(values: Tensor, weights: Tensor, share: float) -> float:
    """The value above which lies `share` of the total weight; both tensors [n]."""
    order = values.argsort(descending=True)
    cumulated = weights[order].double().cumsum(0)
    place = int(torch.searchsorted(cumulated, share * float(cumulated[-1])))
    return float(values[order[min(place, len(order) - 1)]])


class TargetController:
    """Steers λ of `optimizer` so that a share `target` of the weighted connections stays, exactly.

    `target` is the share of Σ weight · connections that is live when the masks freeze, in (0, 1);
    `weights` says what one connection of each tensor counts, by name: 1 for a density, its uses per
    forward pass for MACs (`weight_uses`). `steps` are the updates in which masks are learned, times
    the mean factor of mask_lr over them.

    The state is the caller's to keep (`Steering`), so that a checkpoint can hold it. Every rank
    comes to the same λ: it sees the same mask variables.
    """

    def __init__(
        self, optimizer: SCL, *, target: float, weights: Mapping[str, float], steps: float
    ) -> None:
        [self._group] = [group for group in optimizer.param_groups if group["connections"]]
        group = self._group
        self._optimizer, self.target = optimizer, target
        self._weights = {name: weights[name] for name in group["names"]}
        self._sizes = [math.prod(shape) for shape in group["shapes"]]
        mask_lr, momentum = group.get("initial_mask_lr", group["mask_lr"]), group["mask_momentum"]
        self.plant = Plant(
            start=group["mask_init"],
            reach=mask_lr / (1 - momentum) * steps,
            memory=momentum / (1 - momentum) / steps,
        )
        self.horizon = max(1 / _ACTS, 1 / steps, self.plant.memory)
        """How far ahead λ looks: less than momentum remembers would make it swing."""
        self.learned = 1.0
        """The share that was live before the choice, once that has been made here."""
        self.start = Steering(self.plant.start / self.plant.reach / _BEGIN)

    def steer(self, travel: float, before: Steering) -> Steering:
        """A new λ, where it is time for one; at a `travel` of 1 the choice. Collective.

        Before each update, with the share of all movement of masks that lies behind it.
        """
        if travel >= 1 and not before.is_final:
            self.learned = self.reached()
            self._optimizer.keep_share(self.target, self._weights)
            return Steering(before.lam, travel, is_final=True)
        if not 0 < travel < 1 or int(travel * _ACTS) == int(before.travel * _ACTS):
            return before
        values = self._optimizer.sample_mask_variables(_SAMPLE)
        stride = max(1, sum(self._sizes) // _SAMPLE)
        counts = [-(-size // stride) for size in self._sizes]
        if len(values) != sum(counts):
            # Not every tensor has had a gradient yet.
            return before
        weights = torch.tensor([*self._weights.values()]).repeat_interleave(torch.tensor(counts))
        then = min(1.0, travel + self.horizon)
        share = min(_MOST, wanted(then, self.target))
        return self.plant.next(before, travel, then, share_above(values, weights, share))

    def reached(self) -> float:
        """The share that is live now, exactly. Collective where state is sharded."""
        live = self._optimizer.live_connections()
        weighted = zip(self._weights.items(), self._sizes, strict=True)
        have = total = 0.0
        for (name, weight), size in weighted:
            have, total = have + weight * live[name], total + weight * size
        return have / total
