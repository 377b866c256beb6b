"""Iterative magnitude pruning (IMP): train, prune, train again, as one run.

Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", arXiv 1803.03635; rewinding to an early
update: Frankle et al., arXiv 1912.05671; of the learning rate alone: Renda, Frankle and Carbin,
arXiv 2003.02389. Accelerated, with each training but the last shorter: Zullich et al., ICPR 2020,
10.1109/ICPR48806.2021.9412705, of which the abstract alone was at hand. It says that more than half
of the time can be saved; how much shorter they are here is our choice.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import again, reached
from sclcore.driver.masked import MaskedMethod, keep_largest, live_masks
from sclcore.driver.rewind import forget, keep_weights, put_back, rest
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from sclcore.driver.net import Net

_KEPT = "rewind"
# With fewer updates between two prunings, the second removes what the first has just hurt.
_FEW = 10


class IMP(MaskedMethod, frozen=True):
    """Iterative magnitude pruning, one threshold for all layers (arXiv 1803.03635, 2003.02389).

    The epochs of the recipe are those of all trainings together. Each goes through the whole
    schedule of the learning rate, without momentum from the one before; before each but the first
    the smallest of the weights that live are removed, ⌊f · live⌋ of them. Under weight rewinding
    those that are left, and all biases and parameters of norms, return to what they were at
    `rewind_to` of the first training; the others go through the schedule from there on. Statistics
    of batch norm are not rewound.
    """

    look: ClassVar = ("#e69f00", "P")
    example: ClassVar = {"iterations": 2, "rewind": "weights", "rewind_to": 0.2}

    name: Literal["imp"] = Field(
        default="imp", description="train, remove the smallest weights, train again, and so on"
    )
    iterations: int = Field(
        ge=1, description="prunings: the network is trained once more often than that"
    )
    prune_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of the live connections that each removes"
    )
    rewind: Literal["lr", "weights"] = Field(
        default="lr",
        description="what begins again after each pruning: the schedule of the learning rate, or "
        "the weights as well",
    )
    rewind_to: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="weights: the share of the first training they return to (0: initial weights)",
    )
    shorter: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="how long each training but the last is, in lengths of the last",
    )

    @model_validator(mode="after")
    def _rewinds_weights(self) -> Self:
        if self.rewind_to and self.rewind != "weights":
            raise ValueError("rewind_to would do nothing with rewind: lr; leave it out")
        return self

    @property
    def _places(self) -> list[float]:
        """The progress at which each training begins; the first of them is 0."""
        left = 1 - self.rewind_to
        lengths = [self.shorter, *[self.shorter * left] * (self.iterations - 1)]
        whole = sum(lengths) + left
        return [0.0, *(done / whole for done in accumulate(lengths))]

    def lr_progress(self, progress: float) -> float:
        return again(progress, self._places, self.rewind_to)

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The last pruning is part of the first update of the last training."""
        return step > 0 and reached((step - 1) / total_steps, self._places[-1])

    def foreseen(self, schedule: Schedule, total_steps: int) -> list[str]:
        places = self._places
        shortest = math.floor(total_steps * (places[-1] - places[-2]))
        if shortest >= _FEW:
            return []
        return [
            f"warning: imp-too-short: a training between two prunings is {shortest} of this run's "
            f"{total_steps:,} updates: raise optim.epochs or method.shorter, or lower "
            "method.iterations"
        ]

    def before_update(self, net: Net) -> None:
        state, places = net.tensors[0].state, self._places
        done = state.get("iteration", 0)
        due = sum(reached(net.progress, place) for place in places[1:])
        early = self.rewind == "weights" and not done and _KEPT not in state
        if early and reached(net.progress, self.rewind_to * places[1]):
            keep_weights((*net.tensors, *net.others), _KEPT)
        for _ in range(due - done):
            self._begin_again(net)
        state["iteration"] = due
        if due == self.iterations:
            forget((*net.tensors, *net.others), _KEPT)

    def _begin_again(self, net: Net) -> None:
        live = sum(int(mask.sum()) for mask in live_masks(net))
        keep_largest(net, live - math.floor(self.prune_fraction * live))
        parameters = (*net.tensors, *net.others)
        if self.rewind == "weights":
            put_back(parameters, _KEPT)
            self.write(net)
        rest(parameters)

    def step(self, net: Net) -> bool:
        # Here for loops that only step.
        self.before_update(net)
        net.move(live_masks(net))
        return True

    def metrics(self, net: Net) -> dict[str, float]:
        """How many prunings lie behind."""
        return {"imp/iteration": float(net.tensors[0].state.get("iteration", 0))}
