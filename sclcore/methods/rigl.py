"""RigL: a sparse network from the first update on, which moves its connections while it trains.

Source: Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
ICML 2020, arXiv 1911.11134, Algorithm 1; the densities of layers are those of its Erdős–Rényi
kernel. With gradients of all connections at hand, growing costs nothing here, but nothing of the
sparsity is saved in training either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sclcore.choice import largest
from sclcore.courses import half_cosine
from sclcore.driver.budgets import erk_counts
from sclcore.driver.masked import MaskedMethod, live_masks, set_mask
from sclcore.lazy import torch
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net


class RigL(MaskedMethod, frozen=True):
    """RigL with the densities of an Erdős–Rényi kernel (arXiv 1911.11134).

    Drops the smallest weights of each layer and grows those with the largest gradients. The density
    holds exactly and always. In an update that exchanges connections, weights do not move.
    """

    look: ClassVar = ("#009e73", "^")
    example: ClassVar = {"density": 0.2, "end": 0.9, "every": 4}
    begins_sparse: ClassVar = True

    name: Literal["rigl"] = Field(
        default="rigl", description="sparse from the start; drop and grow connections"
    )
    density: float = Field(gt=0, le=1, description="share of connections that live, at all times")
    drop_fraction: float = Field(
        default=0.3, gt=0, le=1, description="share of a layer exchanged at first; falls to 0"
    )
    end: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="progress from which nothing is exchanged (schedule.freeze_masks_at is for "
        "scl)",
    )
    every: int = Field(default=100, ge=1, description="updates between two exchanges")

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return step / total_steps >= self.end

    def first_masks(self, net: Net, fresh: list[Connected]) -> list[Tensor]:
        generator = net.random()
        masks = []
        counts = erk_counts([each.param.shape for each in fresh], self.density)
        for each, count in zip(fresh, counts, strict=True):
            mask = torch.zeros(each.param.numel(), dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=generator)[:count]] = True
            masks.append(mask.view(each.param.shape))
        return masks

    def step(self, net: Net) -> bool:
        if not net.updates or net.updates % self.every or net.progress >= self.end:
            net.move(live_masks(net))
            return True
        share = half_cosine(net.progress, first=self.drop_fraction, end=self.end)
        for each in net.tensors:
            if each.param.grad is not None:
                set_mask(each, _exchanged(each, each.param.grad, share))
        return False


def _exchanged(each: Connected, grad: Tensor, share: float) -> Tensor:
    """The mask after one exchange: as many connections as before.

    What was just dropped may grow again at once, and then keeps its value.
    """
    mask = each.state["mask"]
    live = int(mask.sum())
    dropped = int(share * live)
    sizes = torch.where(mask, each.param.abs(), -1.0).flatten()
    kept = largest(sizes, live - dropped)
    return kept | largest(torch.where(kept, -1.0, grad.abs().flatten()), dropped)
