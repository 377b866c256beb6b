"""OptG: a free score for each connection, learned through a hard gate; the largest of all live.

Source: Zhang, Lin, Chen, Chao and Ji, "Optimizing Gradient-driven Criteria in Network Sparsity:
Gradient is All You Need", arXiv 2201.12826, and its program (zyxxmu/OptG):

    v = w ⊙ 1[m is one of the k largest of the network]        m = 0 at first
    ∂L/∂w = G ⊙ mask        ∂L/∂m = G ⊙ w                      straight through, not normalised

m moves by SGD with the momentum of the weights and no decay. Both its learning rate, in shares of
theirs, and the sparsity, in shares of the final one, follow σ(β · (progress − ½)). There β is 1 per
epoch, so 100 on ImageNet, and k largest are found once in an epoch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sclcore.driver.latent import move_latent, with_momentum
from sclcore.driver.masked import best_of_all
from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net

# A sigmoid never ends: this close to 1 it is 1, so that the density is exact.
_NEAR = 1e-3


class OptG(DrivenMethod, frozen=True):
    """OptG: learned scores, one hard gate over all of them (arXiv 2201.12826).

    The latent weights and the scores are state, `weight` and `score`; dead weights decay with the
    others. Only the order of the scores counts. The best of each layer lives, whatever its score.
    """

    look: ClassVar = ("#117733", "X")
    example: ClassVar = {"density": 0.2, "steepness": 40, "every": 3}
    started_by: ClassVar = "score"

    name: Literal["optg"] = Field(
        default="optg", description="learn a score of each connection; the largest live"
    )
    density: float = Field(gt=0, le=1, description="share of connections that live in the end")
    steepness: float = Field(
        default=100.0,
        ge=20,
        allow_inf_nan=False,
        description="β: how fast the sparsity rises at half-time, per length of the run",
    )
    every: int = Field(default=10, ge=1, description="updates between two choices of what lives")

    def start(self, net: Net, fresh: list[Connected]) -> None:
        for each in fresh:
            each.state["weight"] = each.param.detach().clone()
            each.state["mask"] = torch.ones_like(each.param, dtype=torch.bool)
            for key in ("score", "score_momentum"):
                each.state[key] = torch.zeros_like(each.param)

    def step(self, net: Net) -> bool:
        share = self._share(net.progress)
        for each in net.tensors:
            gradient = each.grad * each.state["weight"]
            moved = with_momentum(net.settings, each.state["score_momentum"], gradient)
            each.state["score"].sub_(share * net.settings["lr"] * moved)
        masks = [each.state["mask"] for each in net.tensors]
        move_latent(net, masks)
        if net.updates % self.every == 0:
            sparsity = (1 - self.density) * (1.0 if share > 1 - _NEAR else share)
            scores = [each.state["score"].flatten() for each in net.tensors]
            kept = best_of_all(net, scores, round((1 - sparsity) * sum(map(len, scores))))
            for mask, new in zip(masks, kept, strict=True):
                mask.copy_(new.view_as(mask))
        self.write(net)
        return True

    def _share(self, progress: float) -> float:
        """σ(β · (progress − ½)): of the final sparsity, and of the weights' learning rate."""
        return 1 / (1 + math.exp(-self.steepness * (progress - 0.5)))

    def masks(self, net: Net) -> list[Tensor]:
        return [each.state["mask"].clone() for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            each.param.copy_(torch.where(each.state["mask"], each.state["weight"], 0.0))

    def take(self, net: Net, each: Connected) -> int:
        v, mask = each.param, each.state["mask"]
        lost = int(torch.count_nonzero(v.masked_fill(mask, 0.0)))
        each.state["weight"].copy_(torch.where(mask, v, each.state["weight"]))
        each.param.copy_(torch.where(mask, v, 0.0))
        return lost
