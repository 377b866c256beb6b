"""The settings of one step, as the update of a piece needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdamW:
    """The settings of AdamW at this step; `updates` are those before it."""

    beta1: float
    beta2: float
    eps: float
    updates: int


@dataclass(frozen=True)
class Options:
    """The settings of one parameter group at this step; `price` is λ · c of the tensor."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    mask_lr: float
    mask_momentum: float
    proxy: str
    price: float
    noise: int
    """Seeds the random rounding of mask variables in bfloat16; another number at each step."""
    adamw: AdamW | None = None
    """Where given, weights move by AdamW, and SGD's settings are not used."""


def adamw_of(group: Mapping[str, Any]) -> AdamW | None:
    """AdamW's settings of a parameter group that is moved by it."""
    if group["weight_rule"] != "adamw":
        return None
    beta1, beta2 = group["betas"]
    return AdamW(beta1, beta2, group["eps"], group["updates"])
