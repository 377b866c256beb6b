"""Methods whose parameters are written from latent weights: the state `weight` of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sclcore.driver.net import Net


def move_latent(net: Net, masks: Iterable[Tensor]) -> None:
    """One update of the latent weights by their group's rule, with G ⊙ mask for a gradient.

    The parameters are the latent weights afterwards, and have to be written.
    """
    for each in net.tensors:
        each.param.copy_(each.state["weight"])
    net.move(masks)
    for each in net.tensors:
        each.state["weight"].copy_(each.param)
