"""Projection onto balls whose corners are sparse: projected gradient, and double descent.

Source: Barlaud and Guyard, "Learning sparse deep neural networks using efficient structured
projections", ICPR 2020, hal-02556382, with the authors' programs; the balls are in
`sclcore.driver.projections`. There the radius is a number, the same for every layer; here it is a
share of each tensor's own norm, since layers differ in size. Biases and norms are not projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import again, reached
from sclcore.driver.masked import MaskedMethod, bury, live_masks
from sclcore.driver.projections import BALLS, matrix_of, weight_of
from sclcore.driver.rewind import forget, keep_weights, put_back, rest
from sclcore.lazy import torch
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from sclcore.driver.net import Connected, Net

_KEPT = "initial"


class Projection(MaskedMethod, frozen=True):
    """Weights on the ball of a norm (hal-02556382): what a projection leaves at 0 is dead.

    *Double descent* (`every: once`): the dense network is trained until `end`, projected once, and
    what is left is trained a second time, through the whole schedule of the learning rate.
    *Projected gradient*: from `begin` to `end` weights are projected after each update, or so many,
    or each epoch; what is 0 may come back. Either way connections are fixed from `end` on.

    The radius is `radius` times the norm that the tensor had when it was first projected, at once
    and for good. One that shrinks by and by hardly makes zeros, since each of its thresholds is
    below what an update adds; a share of the present norm, taken each time, starves the network.
    """

    look: ClassVar = ("#56b4e9", "X")
    example: ClassVar = {"radius": 0.3, "end": 0.7, "every": "epoch"}

    name: Literal["projection"] = Field(
        default="projection", description="project weights onto balls with sparse corners"
    )
    ball: Literal["l1", "l21", "l11", "l1inf"] = Field(
        default="l1",
        description="l1: single weights; l21, l11 (bi-level), l1inf (bi-level): whole groups too",
    )
    over: Literal["columns", "rows"] = Field(
        default="columns",
        description="groups: columns, which are input features or channels, or rows, output ones",
    )
    radius: float = Field(
        gt=0, lt=1, description="share of each tensor's norm that is left: the knob of sparsity"
    )
    every: Literal["update", "epoch", "once"] | Annotated[int, Field(ge=1)] = Field(
        default="once",
        description="how often they are projected; a number counts updates; once: double descent",
    )
    begin: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="progress of the first projection, where there are many",
    )
    end: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="progress of the last projection, after which connections are fixed "
        "(schedule.freeze_masks_at is for scl)",
    )
    restart: Literal["projected", "initial"] = Field(
        default="projected",
        description="once: the weights of the second descent, as they were projected, or the "
        "initial ones of those that are left",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.every == "once":
            if self.begin:
                raise ValueError("begin would do nothing with every: once; leave it out")
        elif self.begin >= self.end:
            raise ValueError(f"begin must lie below end, which is {self.end}")
        elif self.restart == "initial":
            raise ValueError("restart: initial needs every: once, which is double descent")
        return self

    def lr_progress(self, progress: float) -> float:
        return again(progress, [0.0, self.end]) if self.every == "once" else progress

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The last projection is part of the first update at `end` or later."""
        return step > 0 and reached((step - 1) / total_steps, self.end)

    def start(self, net: Net, fresh: list[Connected]) -> None:
        super().start(net, fresh)
        if self.restart == "initial":
            keep_weights((*fresh, *net.others), _KEPT)

    def before_update(self, net: Net) -> None:
        if self.every != "once" or _is_final(net) or not reached(net.progress, self.end):
            return
        self._project(net)
        self._fix(net)
        parameters = (*net.tensors, *net.others)
        if self.restart == "initial":
            put_back(parameters, _KEPT)
            forget(parameters, _KEPT)
            self.write(net)
        rest(parameters)

    def step(self, net: Net) -> bool:
        # Here for loops that only step.
        self.before_update(net)
        if _is_final(net):
            net.move(live_masks(net))
            return True
        every = torch.ones((), dtype=torch.bool, device=net.tensors[0].param.device)
        net.move([every] * len(net.tensors))
        if self.every != "once" and reached(net.progress, self.begin):
            self._project_if_due(net)
        return True

    def _project_if_due(self, net: Net) -> None:
        """Also say what is 0."""
        ended = reached(net.progress, self.end)
        if ended or self._is_due(net):
            self._project(net)
            net.tensors[0].state.pop("is_due", None)
        for each in net.tensors:
            torch.ne(each.param, 0, out=each.state["mask"])
        if ended:
            self._fix(net)

    def _is_due(self, net: Net) -> bool:
        if isinstance(self.every, int):
            return net.updates % self.every == 0
        return self.every == "update" or "is_due" in net.tensors[0].state

    def after_epoch(self, net: Net, results: Mapping[str, float]) -> None:
        """What has just been evaluated is saved as it is; the next update projects it."""
        if self.every == "epoch" and not _is_final(net):
            net.tensors[0].state["is_due"] = True

    def _project(self, net: Net) -> None:
        ball = BALLS[self.ball]
        for each in net.tensors:
            axis = int(each.transposed == (self.over == "rows"))
            matrix = matrix_of(each.param, axis)
            radius = self.radius * each.state.setdefault("norm", ball.norm(matrix))
            each.param.copy_(weight_of(ball.project(matrix, radius), each.param, axis))

    def _fix(self, net: Net) -> None:
        for each in net.tensors:
            each.state["mask"].copy_(each.param != 0)
            bury(each)
        net.tensors[0].state["is_final"] = True

    def write(self, net: Net) -> None:
        if _is_final(net):
            super().write(net)

    def take(self, net: Net, each: Connected) -> int:
        if _is_final(net):
            return super().take(net, each)
        if "norm" in each.state:
            each.state["mask"].copy_(each.param != 0)
        return 0


def _is_final(net: Net) -> bool:
    return bool(net.tensors[0].state.get("is_final"))
