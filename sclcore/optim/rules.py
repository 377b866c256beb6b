"""How weights move, given their gradient: SGD with momentum, or AdamW; latent and dense ones alike.

The arithmetic is torch's own (`torch.optim.SGD`; `torch.optim.AdamW`, fused: Loshchilov and Hutter,
arXiv 1711.05101), so that a network without masks is trained bit for bit as torch trains it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from sclcore.optim.layerwise import share_of
from sclcore.optim.settings import buffers_of


@dataclass(frozen=True)
class AdamW:
    """The settings of AdamW at this step; `updates` are those before it."""

    beta1: float
    beta2: float
    eps: float
    updates: int


def adamw_of(group: Mapping[str, Any]) -> AdamW | None:
    """AdamW's settings of a parameter group that is moved by it."""
    if group["weight_rule"] != "adamw":
        return None
    beta1, beta2 = group["betas"]
    return AdamW(beta1, beta2, group["eps"], group["updates"])


def total_norm(groups: Sequence[dict[str, Any]]) -> Tensor:
    """The 2-norm of what this rank has of the gradient; its squares add up over the ranks.

    A whole tensor beside sharded ones is on each of the n ranks, so each counts it by 1/√n.
    """
    grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
    meshes = [g.device_mesh.size() for g in grads if isinstance(g, DTensor)]
    if not meshes:
        return torch.nn.utils.get_total_norm(grads)
    whole = 1 / math.sqrt(meshes[0])
    parts = [g.to_local() if isinstance(g, DTensor) else g * whole for g in grads]
    return torch.nn.utils.get_total_norm(parts)


def step_dense(group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Move the parameters of a group, none of which is latent."""
    by_share: dict[float, list[Tensor]] = {}
    for place, p in enumerate(group["params"]):
        if p.grad is not None:
            by_share.setdefault(share_of(group, place), []).append(p)
    if not by_share:
        return
    rule = adamw_of(group)
    group["updates"] += 1
    for share, params in by_share.items():
        _move(params, group, rule, share * group["lr"], state)


def _move(
    params: list[Tensor],
    group: Mapping[str, Any],
    rule: AdamW | None,
    lr: float,
    state: MutableMapping[Any, dict[str, Any]],
) -> None:
    grads: list[Any] = [p.grad for p in params]
    if rule is not None:
        for p in params:
            for key in buffers_of(group):
                if key not in state[p]:
                    state[p][key] = torch.zeros_like(p)
        averages, squares = ([state[p][key] for p in params] for key in buffers_of(group))
        step_adamw(params, grads, averages, squares, rule, lr, group["weight_decay"])
        return
    buffers = [state[p].get("momentum_buffer") for p in params]
    sgd(
        params,
        grads,
        buffers,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
        foreach=params[0].is_cuda,
    )
    for p, buffer in zip(params, buffers, strict=True):
        if buffer is not None:
            state[p]["momentum_buffer"] = buffer


def step_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    rule: AdamW,
    lr: float,
    weight_decay: float,
) -> None:
    """One update. The count is handed over anew, since a group's is exact and saved with it."""
    adamw(
        params,
        grads,
        averages,
        squares,
        [],
        [torch.full((), float(rule.updates), device=p.device) for p in params],
        fused=True,
        amsgrad=False,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=rule.eps,
        maximize=False,
    )
