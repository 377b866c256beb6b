"""Methods whose masks are state: bool tensors that a rule exchanges from time to time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from sclcore.choice import best_of_blocks, largest, largest_of_all
from sclcore.driver.method import DrivenMethod
from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Connected, Net

# What the rules of the weights keep of each weight: it is cleared with the weight.
_BUFFERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class MaskedMethod(DrivenMethod, frozen=True):
    """Its masks are the state `mask` of each tensor, bool and of the tensor's shape.

    What is dead is exactly 0, weight and momentum, until the rule brings it back. A subclass says
    which masks a network begins with and, at an update, which it has from now on.
    """

    layerwise: ClassVar = True

    def first_masks(self, net: Net, fresh: list[Connected]) -> list[Tensor]:
        return [torch.ones_like(each.param, dtype=torch.bool) for each in fresh]

    def start(self, net: Net, fresh: list[Connected]) -> None:
        for each, mask in zip(fresh, self.first_masks(net, fresh), strict=True):
            each.state["mask"] = mask.to(each.param.device)
            bury(each)

    def masks(self, net: Net) -> list[Tensor]:
        return [each.state["mask"].clone() for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            bury(each)

    def take(self, net: Net, each: Connected) -> int:
        lost = int(torch.count_nonzero(each.param.masked_fill(each.state["mask"], 0.0)))
        bury(each)
        return lost


def set_mask(each: Connected, mask: Tensor) -> None:
    """Exchange the mask of a tensor."""
    each.state["mask"].copy_(mask.view_as(each.param))
    bury(each)


def bury(each: Connected) -> None:
    """Zero what is dead: the weight, and what the rule of the weights keeps of it."""
    mask = each.state["mask"]
    buffers = [each.state[key] for key in _BUFFERS if key in each.state]
    for tensor in (each.param, *buffers):
        tensor.copy_(torch.where(mask, tensor, 0.0))


def live_masks(net: Net) -> list[Tensor]:
    """The masks of all tensors: the state itself, not copies."""
    return [each.state["mask"] for each in net.tensors]


def keep_largest_of_each(net: Net, counts: Sequence[int]) -> None:
    """Keep the largest weights of each layer that live, so many of each."""
    for each, count in zip(net.tensors, counts, strict=True):
        mask = each.state["mask"]
        scores = torch.where(mask, each.param.abs(), -1.0).flatten()
        set_mask(each, largest(scores, min(count, int(mask.sum()))))


def keep_largest_of_blocks(net: Net, count: int, size: int) -> None:
    """Keep of every `size` neighbours of the flattened fan-in the `count` largest that live."""
    for each in net.tensors:
        scores = torch.where(each.state["mask"], each.param.abs(), -1.0)
        kept = best_of_blocks(scores.reshape(-1, size), count)
        set_mask(each, kept.view(each.param.shape) & each.state["mask"])


def keep_largest(net: Net, count: int) -> None:
    """Keep the `count` largest weights of all layers, of those that live.

    The largest of each layer stays even so, which then is one of `net.held_layers`.
    """
    # What is dead comes after a live weight that happens to be 0.
    scores = [
        torch.where(each.state["mask"], each.param.abs(), -1.0).flatten() for each in net.tensors
    ]
    count = min(count, sum(int((score >= 0).sum()) for score in scores))
    for each, mask in zip(net.tensors, best_of_all(net, scores, count), strict=True):
        set_mask(each, mask)


def best_of_all(net: Net, scores: list[Tensor], count: int) -> list[Tensor]:
    """Which `count` connections of all layers have the largest scores; flat, one mask a tensor.

    The best of each layer is chosen even so, which then is one of `net.held_layers`.
    """
    kept = largest_of_all(scores, count)
    dying = [e.name for e, mask in zip(net.tensors, kept, strict=True) if not mask.any()]
    if dying:
        net.held_layers = dying
        scores = [score.masked_fill(largest(score, 1), torch.inf) for score in scores]
        kept = largest_of_all(scores, max(count, len(scores)))
    return kept
