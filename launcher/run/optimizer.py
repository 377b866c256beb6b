"""Recipe → optimizer: what moves the weights, and the masks with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from launcher.recipe.method import OptimConfig
from sclcore.driver.build import optimizer_of
from sclcore.driver.method import Method
from sclcore.optim.layerwise import share_learning_rates


def build_optimizer(
    method: Method, optim: OptimConfig, model: nn.Module, example: Tensor
) -> Optimizer:
    """The optimizer of `method` over `model`; `example` is one input, for its shape alone.

    Raises UsageError where the method does not fit the model, such as a pattern of layers that
    none of them matches, or where the model does not say which layer comes after which and that
    has to be known.
    """
    try:
        # torch's own seed is the recipe's: it has been set before the model was made.
        optimizer = optimizer_of(method, model, example, optim.weights(), torch.initial_seed())
    except ValueError as error:
        raise UsageError(f"method: {error}") from error
    if optim.layer_decay is not None:
        share_learning_rates(optimizer, model, _layer_shares(model, optim.layer_decay))
    return optimizer


def _layer_shares(model: nn.Module, decay: float) -> dict[str, float]:
    """Of each parameter, the share of the learning rate of its layer, as timm parts them."""
    if not hasattr(model, "group_matcher"):
        raise UsageError(
            "optim.layer_decay: this model does not say which of its layers comes after which, as "
            "timm's do: leave it out, or take one of timm's models"
        )
    # Here because it takes seconds to import, which only this key should cost.
    from timm.optim import param_groups_layer_decay

    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
