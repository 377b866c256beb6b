"""AC/DC: dense and sparse phases in turn; the last is sparse.

Source: Peste, Iofinova, Vladu and Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of
Deep Neural Networks", NeurIPS 2021, arXiv 2106.12379. The places of the phases are those of its
program for ImageNet (IST-DASLab/ACDC): of 100 epochs 10 are dense, then 5 sparse and 5 dense in
turn, 10 dense from 75 on, and 15 sparse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import phase_at, reached
from sclcore.driver.masked import MaskedMethod, keep_largest, live_masks
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from sclcore.driver.net import Net


class ACDC(MaskedMethod, frozen=True):
    """AC/DC: sparse and dense phases in turn, one threshold (arXiv 2106.12379).

    A sparse phase begins with the largest weights of the network and keeps those connections; in a
    dense one those that were dead begin at 0, without momentum. The density is reached exactly, and
    holds in every sparse phase.
    """

    look: ClassVar = ("#44aa99", "p")
    example: ClassVar = {"density": 0.2, "phase": 0.1}

    name: Literal["acdc"] = Field(
        default="acdc", description="train densely and sparsely in turn, sparsely at the end"
    )
    density: float = Field(gt=0, le=1, description="share of connections that live when sparse")
    begin: float = Field(
        default=0.1, ge=0, lt=1, description="progress at which the first sparse phase begins"
    )
    phase: float = Field(
        default=0.05, gt=0, le=0.5, description="length of a phase, as a share of the run"
    )
    last_dense: float = Field(
        default=0.75, gt=0, lt=1, description="progress at which the last dense phase begins"
    )
    end: float = Field(
        default=0.85, gt=0, lt=1, description="progress from which the network stays sparse"
    )

    @model_validator(mode="after")
    def _comes_in_order(self) -> Self:
        if not self.begin < self.last_dense < self.end:
            raise ValueError(
                "begin, last_dense and end must rise, not "
                f"{self.begin}, {self.last_dense}, {self.end}"
            )
        return self

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The last pruning is part of the first update at `end` or later."""
        return step > 0 and reached((step - 1) / total_steps, self.end)

    def before_update(self, net: Net) -> None:
        state, is_sparse = net.tensors[0].state, self._is_sparse(net.progress)
        if is_sparse == state.get("is_sparse", False):
            return
        state["is_sparse"] = is_sparse
        if is_sparse:
            keep_largest(net, round(self.density * sum(net.connection_sizes().values())))
            return
        for mask in live_masks(net):
            mask.fill_(True)

    def _is_sparse(self, progress: float) -> bool:
        if reached(progress, self.last_dense):
            return reached(progress, self.end)
        number = phase_at(progress, begin=self.begin, length=self.phase)
        return number >= 0 and number % 2 == 0

    def step(self, net: Net) -> bool:
        # Here for loops that only step.
        self.before_update(net)
        net.move(live_masks(net))
        return True
