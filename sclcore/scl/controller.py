"""λ that is steered to a density: the quantile that should end at 0 travels there evenly.

With s = mask_lr / (1 - mask_momentum), a mask variable moves by -s · (ĝ + λ · c) per update. A
share ρ of the connections is live at the end if the (1 - ρ) quantile q of the mask variables is 0
then. Under a constant λ and steady gradients q falls in a straight line; so q is held to a line
from mask_init that flattens out at 0, by the λ that this speed takes and a proportional-integral
law on the error, critically damped and tighter towards the end. Nothing is tuned per network: the
gain of the plant is s, which is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sclcore.scl.optimizer import SCL

# Of the travel: up to here q falls evenly, from here on ever more slowly.
_LANDING = 0.7
# The travel in which an error decays: at most this, at most so much of what is left, and never so
# little that momentum, or the time between two acts, would make the loop swing.
_SLOWEST, _OF_THE_REST, _MEMORIES = 0.1, 1 / 3, 2
_ACTS = 100
_SAMPLE = 1_000_000


@dataclass(frozen=True)
class Steering:
    """What the controller remembers: λ, and at its last act the travel and the error of q."""

    lam: float
    travel: float = 0.0
    error: float = 0.0


def next_steering(
    before: Steering, travel: float, quantile: float, *, start: float, reach: float, decay: float
) -> Steering:
    """The λ from `travel` (share of all movement that masks will make, 0 to 1) on.

    `quantile` is q now, `start` where it began (mask_init), `reach` = dq/dtravel per unit of λ, and
    `decay` the travel in which an error decays. A PI law in its incremental form: with
    dq/dtravel = -reach · (λ + gradient), gains 1 / (reach · decay) and 1 / (4 · reach · decay²)
    put both poles of the closed loop at 1 / (2 · decay).
    """
    error = quantile - start * line(travel)
    change = start * (slope(before.travel) - slope(travel)) / reach
    change += (error - before.error) / (reach * decay)
    change += (travel - before.travel) * error / (4 * reach * decay**2)
    return Steering(max(0.0, before.lam + change), travel, error)


def line(travel: float) -> float:
    """What q should be, in units of where it began: from 1 to 0."""
    if travel < _LANDING:
        return 1 - 2 / (1 + _LANDING) * travel
    return (1 - travel) ** 2 / (1 - _LANDING**2)


def slope(travel: float) -> float:
    """The derivative of `line`, which is continuous."""
    rest = (1 - travel) / (1 - _LANDING)
    return -2 / (1 + _LANDING) * min(1.0, rest)


def decay_at(travel: float, fastest: float) -> float:
    """The travel in which an error should decay: the less is left, the sooner."""
    return max(fastest, min(_SLOWEST, _OF_THE_REST * (1 - travel)))


def share_above(values: Tensor, weights: Tensor, share: float) -> float:
    """The value above which lies `share` of the total weight; both tensors [n]."""
    order = values.argsort(descending=True)
    cumulated = weights[order].double().cumsum(0)
    place = int(torch.searchsorted(cumulated, share * float(cumulated[-1])))
    return float(values[order[min(place, len(order) - 1)]])


class TargetController:
    """Steers λ of `optimizer` so that a share `target` of the weighted connections stays.

    `target` is the share of Σ weight · connections that is live when the masks freeze, in (0, 1);
    `weights` says what one connection of each tensor counts, by name: 1 for a density, its uses per
    forward pass for MACs (`weight_uses`). `steps` are the updates in which masks are learned, times
    the mean factor of mask_lr over them. λ begins at `lam`; None begins where a connection without
    gradient dies at the end.

    The state is the caller's to keep (`Steering`), so that a checkpoint can hold it. Every rank
    comes to the same λ: it sees the same mask variables.
    """

    def __init__(
        self,
        optimizer: SCL,
        *,
        target: float,
        weights: Mapping[str, float],
        steps: float,
        lam: float | None = None,
    ) -> None:
        [self._group] = [group for group in optimizer.param_groups if group["connections"]]
        group = self._group
        self._optimizer, self.target = optimizer, target
        self._weights = [weights[name] for name in group["names"]]
        self._sizes = [math.prod(shape) for shape in group["shapes"]]
        per_step = group.get("initial_mask_lr", group["mask_lr"]) / (1 - group["mask_momentum"])
        self._reach = per_step * steps
        self._fastest = max(_MEMORIES / (1 - group["mask_momentum"]) / steps, _MEMORIES / _ACTS)
        self.start = Steering(group["mask_init"] / self._reach if lam is None else lam)

    def steer(self, travel: float, before: Steering) -> Steering:
        """A new λ, where it is time for one. `travel` as in `next_steering`.

        Collective where state is sharded.
        """
        if not 0 < travel < 1 or int(travel * _ACTS) == int(before.travel * _ACTS):
            return before
        values = self._optimizer.sample_mask_variables(_SAMPLE)
        stride = max(1, sum(self._sizes) // _SAMPLE)
        counts = [-(-size // stride) for size in self._sizes]
        if len(values) != sum(counts):
            # Not every tensor has had a gradient yet.
            return before
        weights = torch.tensor(self._weights).repeat_interleave(torch.tensor(counts))
        return next_steering(
            before,
            travel,
            share_above(values, weights, self.target),
            start=self._group["mask_init"],
            reach=self._reach,
            decay=decay_at(travel, self._fastest),
        )

    def reached(self) -> float:
        """The share that is live now, exactly. Collective where state is sharded."""
        live = self._optimizer.live_connections()
        weighted = zip(self._group["names"], self._weights, self._sizes, strict=True)
        have = total = 0.0
        for name, weight, size in weighted:
            have, total = have + weight * live[name], total + weight * size
        return have / total
