"""Gradual magnitude pruning.

Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878: the sparsity rises by a cubic
schedule while the network trains. There each layer reaches the same sparsity (`budget: layer`); by
default the smallest weights of the whole network go, wherever they are, which is the stronger
baseline. With `n_m` at most N of M neighbours stay, as sparse tensor cores want (Mishra et al.,
arXiv 2104.08378), of every block as many as the schedule allows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import check_course, cubic_density
from sclcore.driver.budgets import erk_counts, layer_counts
from sclcore.driver.masked import (
    MaskedMethod,
    keep_largest,
    keep_largest_of_blocks,
    keep_largest_of_each,
    live_masks,
)
from sclcore.layout.geometry import Geometry, check_n_m, parse_n_m
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sclcore.driver.net import Net

# N / M times M may come out this much above N.
_ROUNDING = 1e-9


class Magnitude(MaskedMethod, frozen=True):
    """Gradual magnitude pruning, one threshold or a share for each layer (after arXiv 1710.01878).

    The density is reached exactly. The largest weight of each layer stays, whatever the threshold.
    """

    look: ClassVar = ("#d55e00", "s")
    example: ClassVar = {"density": 0.2, "end": 0.7, "every": 3}

    name: Literal["magnitude"] = Field(
        default="magnitude", description="remove the smallest weights while training"
    )
    density: float | None = Field(
        default=None, gt=0, le=1, description="share of connections that live in the end"
    )
    n_m: str | None = Field(
        default=None, description="in place of a density: N of M neighbours live, such as 2:4"
    )
    budget: Literal["network", "layer", "erk"] = Field(
        default="network",
        description="whose density that is: the network's, under one threshold; each layer's; or "
        "shared out by an Erdős–Rényi kernel",
    )
    begin: float = Field(default=0.0, ge=0, lt=1, description="progress at which pruning begins")
    end: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="progress at which it ends (schedule.freeze_masks_at is for scl)",
    )
    every: int = Field(default=10, ge=1, description="updates between two prunings")

    @model_validator(mode="after")
    def _has_one_aim(self) -> Self:
        if (self.density is None) == (self.n_m is None):
            raise ValueError("needs density or n_m, one of them: N:M decides the density itself")
        if self.n_m is not None:
            parse_n_m(self.n_m)
            if self.budget != "network":
                raise ValueError(f"takes n_m or budget: {self.budget}: N:M is the same everywhere")
        check_course(self.begin, self.end)
        return self

    @property
    def final_density(self) -> float:
        """The share of connections that live in the end, as set or as N:M says."""
        if self.density is not None:
            return self.density
        n, m = parse_n_m(self.n_m or "")
        return n / m

    def groups(self, model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
        """Those of every method; ValueError where a layer that is not excluded cannot be N:M."""
        groups = super().groups(model, example)
        if self.n_m is not None:
            for group in groups:
                if group["connections"]:
                    _check_blocks(group, parse_n_m(self.n_m))
        return groups

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The last pruning is part of the first update at `end` or later."""
        return step > 0 and (step - 1) / total_steps >= self.end

    def step(self, net: Net) -> bool:
        net.move(live_masks(net))
        ended, state = net.progress >= self.end, net.tensors[0].state
        due = net.progress >= self.begin and net.updates % self.every == 0
        if (ended and not state.get("is_final")) or (due and not ended):
            final = self.final_density
            density = cubic_density(net.progress, final=final, begin=self.begin, end=self.end)
            self._prune(net, density)
        if ended:
            state["is_final"] = True
        return True

    def _prune(self, net: Net, density: float) -> None:
        if self.n_m is not None:
            _, size = parse_n_m(self.n_m)
            keep_largest_of_blocks(net, math.ceil(density * size - _ROUNDING), size)
            return
        if self.budget == "network":
            keep_largest(net, round(density * sum(net.connection_sizes().values())))
            return
        counts = layer_counts if self.budget == "layer" else erk_counts
        keep_largest_of_each(net, counts([each.param.shape for each in net.tensors], density))


def _check_blocks(group: dict[str, Any], n_m: tuple[int, int]) -> None:
    for (name, param), transposed in zip(group["params"], group["transposed_groups"], strict=True):
        check_n_m(Geometry(name, tuple(param.shape), transposed), "weight", n_m)
