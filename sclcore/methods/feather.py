"""Feather, and ST-3 as a case of it: a threshold in the forward pass, straight through it backward.

Source: Glentis Georgoulakis, Retsinas and Maragos, "Feather: An Elegant Solution to Effective DNN
Sparsification", BMVC 2023, arXiv 2310.02448, and its program:

    v = sign(w) · (|w|ᵖ − tᵖ)^(1/p) where |w| > t, else 0      p = 3
    ∂L/∂w = G where |w| > t, else θ · G                       θ = 1, and ½ above 95 % sparsity

with one threshold t for all layers, set anew in each update so that the share of |w| > t follows a
cubic schedule, which ends at half-time. Masks are free to the end. With p = 1, the soft threshold,
and each filter rescaled it is ST-3: Vanderschueren and De Vleeschouwer, "Are Straight-Through
gradients and Soft-Thresholding all you need for Sparse Training?", WACV 2023, whose program
(vanderschuea/stthree) multiplies a filter by 1.01 / (r + 0.01) in the forward pass, r being the
share of its 1-norm that lives, and lets the gradient pass as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.courses import check_course, cubic_density
from sclcore.driver.latent import move_latent
from sclcore.driver.masked import best_of_all
from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net

_THIN, _THETA = 0.05, 0.5
# ST-3's guards against filters in which nothing lives.
_NEARLY_NONE, _AT_MOST = 1e-6, 0.01


class Feather(DrivenMethod, frozen=True):
    """Feather, a powered threshold and straight-through gradients, or ST-3 (arXiv 2310.02448).

    The latent weights w are the state `weight`, the threshold is `threshold`. It lies between the
    smallest weight that lives and the largest that does not, so the density is exact; a layer that
    would die keeps its largest weight, under a threshold of its own.
    """

    look: ClassVar = ("#882255", "H")
    example: ClassVar = {"density": 0.2, "end": 0.7}

    name: Literal["feather"] = Field(
        default="feather", description="threshold weights in the forward pass alone"
    )
    density: float = Field(gt=0, le=1, description="share of connections that live in the end")
    power: float = Field(
        default=3.0, ge=1, le=16, description="p of the threshold: 1 is the soft one (ST-3)"
    )
    theta: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="θ, the share of their gradient that dead weights get (null: 1, and 0.5 below "
        "a density of 5 %)",
    )
    rescale: bool = Field(
        default=False,
        description="scale each filter up by what the threshold takes of its 1-norm (ST-3)",
    )
    begin: float = Field(default=0.0, ge=0, lt=1, description="progress at which thresholds rise")
    end: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="progress at which the density is reached; connections move to the end",
    )

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        check_course(self.begin, self.end)
        return self

    def start(self, net: Net, fresh: list[Connected]) -> None:
        for each in fresh:
            each.state["weight"] = each.param.detach().clone()
            each.state["mask"] = torch.ones_like(each.param, dtype=torch.bool)
            each.state["threshold"] = each.param.new_zeros(())

    def step(self, net: Net) -> bool:
        theta = self.theta if self.theta is not None else (_THETA if self._is_thin else 1.0)
        move_latent(
            net, [each.state["mask"].to(each.param.dtype).clamp(min=theta) for each in net.tensors]
        )
        density = cubic_density(net.progress, final=self.density, begin=self.begin, end=self.end)
        self._choose(net, density)
        self.write(net)
        return True

    @property
    def _is_thin(self) -> bool:
        return self.density < _THIN

    def _choose(self, net: Net, density: float) -> None:
        sizes = [each.state["weight"].abs().flatten() for each in net.tensors]
        count = round(density * sum(map(len, sizes)))
        kept = best_of_all(net, sizes, count)
        dead = [size.masked_fill(mask, 0.0) for size, mask in zip(sizes, kept, strict=True)]
        common = torch.stack([each.max() for each in dead]).max()
        for each, size, mask, below in zip(net.tensors, sizes, kept, dead, strict=True):
            each.state["mask"].copy_(mask.view_as(each.param))
            # Only a layer that was held has something alive below the common threshold.
            is_held = mask.any() and size[mask].min() < common
            each.state["threshold"].copy_(below.max() if is_held else common)

    def masks(self, net: Net) -> list[Tensor]:
        return [each.state["mask"].clone() for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            each.param.copy_(self._effective(each))

    def take(self, net: Net, each: Connected) -> int:
        v, w, mask, t = each.param, *(each.state[k] for k in ("weight", "mask", "threshold"))
        changed = v != self._effective(each).to(v.dtype)
        lost = int((changed & ~mask).sum())
        unscaled = v / self._scale(each)
        grown = unscaled.sign() * (unscaled.abs() ** self.power + t**self.power) ** (1 / self.power)
        w.copy_(torch.where(changed & mask, grown, w))
        each.param.copy_(torch.where(mask, v, 0.0))
        return lost

    def metrics(self, net: Net) -> dict[str, float]:
        """The threshold of the network: weights below it are dead."""
        return {"feather/threshold": max(float(each.state["threshold"]) for each in net.tensors)}

    def _effective(self, each: Connected) -> Tensor:
        """v, its filters scaled where that is asked for."""
        w, t = each.state["weight"], each.state["threshold"]
        size = w.abs()
        # As a share of |w|: its powers may be too small for a float.
        left = (1 - (t / size.clamp(min=torch.finfo(w.dtype).tiny)) ** self.power).clamp(min=0)
        v = torch.where(each.state["mask"], w * left ** (1 / self.power), 0.0)
        return v * self._scale(each)

    def _scale(self, each: Connected) -> Tensor:
        """What each filter is multiplied by, in a shape that spreads over the tensor."""
        size = each.state["weight"].abs()
        if not self.rescale:
            return torch.ones_like(size)
        own = 1 if each.transposed else 0
        others = [axis for axis in range(size.dim()) if axis != own]
        live = torch.where(each.state["mask"], size, 0.0).mean(others, keepdim=True)
        share = (live + _NEARLY_NONE) / (size.mean(others, keepdim=True) + _NEARLY_NONE)
        return (1 + _AT_MOST) / (share + _AT_MOST)
