"""Recipe → optimizer: what moves the weights, and the masks with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from launcher.recipe.method import OptimConfig
from sclcore.driver.build import optimizer_of
from sclcore.driver.method import Method


def build_optimizer(
    method: Method, optim: OptimConfig, model: nn.Module, example: Tensor
) -> Optimizer:
    """The optimizer of `method` over `model`; `example` is one input, for its shape alone.

    Raises UsageError where the method does not fit the model, such as a pattern of layers that
    none of them matches.
    """
    try:
        # torch's own seed is the recipe's: it has been set before the model was made.
        return optimizer_of(method, model, example, optim.weights(), torch.initial_seed())
    except ValueError as error:
        raise UsageError(f"method: {error}") from error
