"""Weight sharing: the live weights of each layer have few values, which are trained.

Source: Marinò, Ghidoli, Frasca and Malchiodi, "Compression strategies and space-conscious
representations for deep neural networks", ICPR 2020, with I which value a weight has:

    v = c[I]        ∂L/∂c_l = Σ over I_ij = l of G_ij

I is fixed when training begins, by k-means or by probabilistic quantisation (`sclcore.sharing`,
which says where the authors' code differs from their text), and weights that are 0 then stay 0. The
gradient above moves c by the rule of the weights; the authors' code has a second lr before the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net


class Share(DrivenMethod, frozen=True):
    """Few values in each layer, moved by the sums of their weights' gradients (ICPR 2020).

    The state of a tensor: `values` [k], how many weights have each, `sizes` [k], and the places of
    these weights in row-major order, value by value, `places` [live].
    """

    look: ClassVar = ("#aa4499", "p")
    keeps_zeros: ClassVar = True
    started_by: ClassVar = "values"

    name: Literal["share"] = Field(
        default="share", description="few values in each layer, of the weights given by init"
    )
    values: int = Field(ge=2, description="different live values in each layer, at most")
    by: Literal["kmeans", "pq"] = Field(
        default="kmeans",
        description="how weights get their values: the nearest mean, or unbiased at random (pq)",
    )

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return True

    def start(self, net: Net, fresh: list[Connected]) -> None:
        from sclcore.sharing import Sharing, share

        # Each layer draws anew, or like numbers would be drawn for like layers.
        seeds = torch.randint(2**62, (len(fresh),), generator=net.random()).tolist()
        for each, seed in zip(fresh, seeds, strict=True):
            values, index = share(each.param, Sharing(self.by, self.values, seed))
            live = each.param.detach().flatten().nonzero().flatten()
            device = each.param.device
            each.state["values"] = values.to(device)
            each.state["sizes"] = torch.bincount(index, minlength=len(values)).to(device)
            each.state["places"] = live[index.argsort(stable=True).to(device)]
            _write(each)

    def step(self, net: Net) -> bool:
        """The rule of the weights moves all weights of a value alike, by their gradients' sum."""
        tensors = net.tensors
        grads = [each.param.grad for each in tensors]
        for each, grad in zip(tensors, grads, strict=True):
            if grad is not None:
                each.param.grad = _spread(each, _summed(each, grad)).to(grad.dtype)
        net.move(self.masks(net))
        for each, grad in zip(tensors, grads, strict=True):
            each.param.grad = grad
            each.state["values"].copy_(each.param.flatten()[_firsts(each)])
            _write(each)
        return True

    def masks(self, net: Net) -> list[Tensor]:
        return [_spread(each, torch.ones_like(each.state["sizes"])).bool() for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            _write(each)

    def take(self, net: Net, each: Connected) -> int:
        """Each value becomes the mean of what its weights are now."""
        lost = torch.count_nonzero(each.param) - torch.count_nonzero(
            each.param.flatten()[each.state["places"]]
        )
        each.state["values"].copy_(_summed(each, each.param) / each.state["sizes"])
        _write(each)
        return int(lost)


def _summed(each: Connected, elements: Tensor) -> Tensor:
    """Σ over the weights of each value, [k]. In double, and in an order that is always the same."""
    live = elements.detach().flatten()[each.state["places"]].double()
    if not len(live):
        # Which segment_reduce does not take: a layer that is dead.
        return live
    return torch.segment_reduce(live, "sum", lengths=each.state["sizes"])


def _spread(each: Connected, of_values: Tensor) -> Tensor:
    """What each value has, for each of its weights, in the parameter's shape; 0 where it's dead."""
    flat = of_values.new_zeros(each.param.numel())
    flat[each.state["places"]] = of_values.repeat_interleave(each.state["sizes"])
    return flat.view(each.param.shape)


def _firsts(each: Connected) -> Tensor:
    """The place of one weight of each value."""
    sizes = each.state["sizes"]
    return each.state["places"][sizes.cumsum(0) - sizes]


def _write(each: Connected) -> None:
    each.param.copy_(_spread(each, each.state["values"]))
