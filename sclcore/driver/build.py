"""Method and model → optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sclcore.driver.method import DrivenMethod, Method
from sclcore.driver.optimizer import Driver


def optimizer_of(
    method: Method, model: nn.Module, example: Tensor, weights: Mapping[str, Any], seed: int = 0
) -> Optimizer:
    """The optimizer of `method` over `model`; `weights` are the settings of what moves the weights.

    `example` is one input, for its shape alone; `seed` decides what the method draws. Raises
    ValueError where the method does not fit the model.
    """
    if isinstance(method, DrivenMethod):
        return Driver(method, method.groups(model, example), **weights, seed=seed)
    return method.build(model, example, weights)
