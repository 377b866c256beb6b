"""SNIP: connections are chosen once, by their sensitivity at the first batch.

Source: Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
ICLR 2019, arXiv 1810.02340, equation (6): |w · ∂L/∂w|, the largest of the whole network.
"""

from typing import Literal

from pydantic import Field

from sclcore.choice import largest_of_all
from sclcore.driver.masked import MaskedMethod, live_masks, set_mask
from sclcore.driver.net import Net
from sclcore.schedule import Schedule


class Snip(MaskedMethod, frozen=True):
    """Connection sensitivity at the first batch (arXiv 1810.02340)."""

    name: Literal["snip"] = Field(default="snip", description="prune once, before training")
    density: float = Field(gt=0, le=1, description="share of connections that live")

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return step > 0

    def step(self, net: Net) -> bool:
        if net.updates > 0:
            net.move(live_masks(net))
            return True
        scores = [(each.param * each.grad).abs().flatten() for each in net.tensors]
        kept = largest_of_all(scores, round(self.density * sum(map(len, scores))))
        for each, mask in zip(net.tensors, kept, strict=True):
            set_mask(each, mask)
        return False
