"""Methods whose parameters are written from latent weights: the state `weight` of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Net

# Where the weights have none, what is learned beside them has SGD's of the recipes.
_MOMENTUM = 0.9


def move_latent(net: Net, masks: Iterable[Tensor]) -> None:
    """One update of the latent weights by their group's rule, with G ⊙ mask for a gradient.

    The parameters are the latent weights afterwards, and have to be written.
    """
    for each in net.tensors:
        each.param.copy_(each.state["weight"])
    net.move(masks)
    for each in net.tensors:
        each.state["weight"].copy_(each.param)


def with_momentum(settings: Mapping[str, Any], velocity: Tensor, step: Tensor) -> Tensor:
    """`step` with the momentum of the weights, which `velocity` keeps; any shape, both alike.

    For what a method learns beside the weights. Under AdamW, which has no momentum of this kind,
    it is 0.9 in Nesterov's form.
    """
    momentum, nesterov = settings["momentum"], settings["nesterov"]
    if settings["weight_rule"] == "adamw":
        momentum, nesterov = _MOMENTUM, True
    velocity.mul_(momentum).add_(step)
    return step + momentum * velocity if nesterov else velocity
