"""Recipe → optimizer: what moves the weights, and the masks with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from launcher.recipe.baselines import MagnitudeMethod, RigLMethod, STRMethod
from launcher.recipe.method import DenseMethod, MethodConfig, OptimConfig, SCLMethod
from sclcore import SCL, connection_groups
from sclcore.baselines import Magnitude, RigL, SoftThreshold
from sclcore.sparse import SparseOptimizer
from sclcore.weights import undecayed


def build_optimizer(
    method: MethodConfig, optim: OptimConfig, model: nn.Module, example: Tensor
) -> Optimizer:
    """The optimizer of `method` over `model`; `example` is one input, for its shape alone.

    Raises UsageError where the method does not fit the model, such as a pattern of layers that
    none of them matches.
    """
    try:
        return _BUILDERS[type(method)](method, optim, model, example)
    except ValueError as error:
        raise UsageError(f"method: {error}") from error


def _scl(method: SCLMethod, optim: OptimConfig, model: nn.Module, example: Tensor) -> SCL:
    groups = connection_groups(
        model,
        exclude=method.exclude,
        cost=method.cost,
        example_input=example,
        granularity=method.granularity,
        n_m=method.n_m,
        **({} if method.train_weights else {"lr": 0.0}),
    )
    return SCL(
        groups,
        **optim.weights(),
        lam=method.lam or 0.0,
        mask_lr=method.mask_lr,
        mask_momentum=method.mask_momentum,
        proxy=method.proxy,
        normalize=method.normalize,
        mask_init=method.mask_init,
        min_connections=method.min_connections,
        mask_dtype=method.mask_dtype,
    )


def _dense(method: DenseMethod, optim: OptimConfig, model: nn.Module, example: Tensor) -> Optimizer:
    """torch's SGD or AdamW; the same parameters are decayed as under `scl`."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    spared = undecayed(model)
    groups = [
        {"params": [p for n, p in parameters.items() if n not in spared]},
        {"params": [p for n, p in parameters.items() if n in spared], "weight_decay": 0.0},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            # Fused, as SCL's step is; not on the meta device, where only shapes are checked.
            fused=not any(p.is_meta for p in parameters.values()),
        )
    return torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov and optim.momentum > 0,
        weight_decay=optim.weight_decay,
    )


def _magnitude(
    method: MagnitudeMethod, optim: OptimConfig, model: nn.Module, example: Tensor
) -> SparseOptimizer:
    rule = method.model_dump(include={"density", "begin", "end", "every"})
    return Magnitude(connection_groups(model, exclude=method.exclude), **optim.weights(), **rule)


def _rigl(
    method: RigLMethod, optim: OptimConfig, model: nn.Module, example: Tensor
) -> SparseOptimizer:
    rule = method.model_dump(include={"density", "drop_fraction", "end", "every"})
    groups = connection_groups(model, exclude=method.exclude)
    # torch's own seed, which the recipe has set.
    return RigL(groups, **optim.weights(), seed=torch.initial_seed(), **rule)


def _str(
    method: STRMethod, optim: OptimConfig, model: nn.Module, example: Tensor
) -> SparseOptimizer:
    rule = method.model_dump(include={"s_init", "s_weight_decay"})
    groups = connection_groups(model, exclude=method.exclude)
    return SoftThreshold(groups, **{**optim.weights(), **optim.momenta()}, **rule)


_BUILDERS: dict[type, Callable[[Any, OptimConfig, nn.Module, Tensor], Optimizer]] = {
    SCLMethod: _scl,
    DenseMethod: _dense,
    MagnitudeMethod: _magnitude,
    RigLMethod: _rigl,
    STRMethod: _str,
}
