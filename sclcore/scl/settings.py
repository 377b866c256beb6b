"""The settings of a parameter group of SCL, held to their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sclcore.kernels.proxies import get_proxy
from sclcore.optim.settings import check_rule

NORMALIZATIONS = ("network", "layer", "feature", "feature_norm", "none")
MASK_GRADIENTS = ("full", "root")
MASK_DTYPES = ("float32", "bfloat16")
# One entry for each tensor of the group.
_PER_TENSOR = ("costs", "transposed_groups", "granularity", "n_m", "param_names")


def check_group(group: Mapping[str, Any]) -> None:
    """ValueError with one sentence where a setting is out of its range."""
    for name in ("lr", "lam", "mask_lr", "weight_decay", "min_connections", "mask_restart"):
        if not group[name] >= 0 or math.isinf(group[name]):
            raise ValueError(f"{name} must be 0 or more and finite, not {group[name]}")
    for name in ("momentum", "mask_momentum"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {group[name]}")
    check_rule(group)
    if not math.isfinite(group["mask_init"]) or group["mask_init"] <= 0:
        raise ValueError(
            f"mask_init must be above 0, so that training starts dense, not {group['mask_init']}"
        )
    get_proxy(group["proxy"])
    for name, known in (
        ("normalize", NORMALIZATIONS),
        ("mask_gradient", MASK_GRADIENTS),
        ("mask_dtype", MASK_DTYPES),
    ):
        if group[name] not in known:
            raise ValueError(f"unknown {name} {group[name]!r}: choose one of {', '.join(known)}")
    for name in _PER_TENSOR:
        if name in group and len(group[name]) != len(group["params"]):
            raise ValueError(f"{name} must have one entry per parameter of its group")
