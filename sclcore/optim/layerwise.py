"""Learning rates that differ from layer to layer: each parameter has a share of its group's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def share_learning_rates(
    optimizer: Optimizer, model: nn.Module, shares: Mapping[str, float]
) -> None:
    """Give each parameter of `model` its share of the learning rate, by name; 1 where it has none.

    Before the first step, and before a `Scheduler` or an engine looks at the groups. Connections
    stay one group, so that their masks are normalised together, and it notes the `lr_shares` of its
    tensors; any other group is parted by share.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for group in [*optimizer.param_groups]:
        own = [shares.get(names[id(p)], 1.0) for p in group["params"]]
        if group.get("connections"):
            group["lr_shares"] = own
        else:
            _part(optimizer, group, own)


def share_of(group: Mapping[str, Any], place: int) -> float:
    """What share of the group's learning rate the tensor at `place` has."""
    return group["lr_shares"][place] if "lr_shares" in group else 1.0


def _part(optimizer: Optimizer, group: dict[str, Any], own: Sequence[float]) -> None:
    whole = dict(group)
    for share in dict.fromkeys(own):
        part = {**whole, "lr": share * whole["lr"]}
        for key in ("params", "param_names"):
            if key in whole:
                part[key] = [v for v, s in zip(whole[key], own, strict=True) if s == share]
        if share == own[0]:
            group.update(part)
        else:
            # Not by add_param_group, which refuses parameters that it knows.
            optimizer.param_groups.append(part)
