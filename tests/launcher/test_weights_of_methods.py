"""A method is its optimizer: what all of them have in common."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.optim import Optimizer

from launcher.recipe.method import MethodConfig, OptimConfig
from launcher.run.optimizer import build_optimizer
from sclcore.methods.dense import Dense
from sclcore.methods.scl import SCLMethod
from sclcore.registry import known_methods
from sclcore.schedule import Schedule

OPTIM = OptimConfig(global_batch_size=8, epochs=1, lr=0.1, name="adamw", weight_decay=0.05)


def without_decay(optimizer: Optimizer) -> set[int]:
    groups = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    return {id(parameter) for group in groups for parameter in group["params"]}


def test_the_same_parameters_are_decayed_with_masks_and_without() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    example = torch.zeros(1, 3, 32, 32)
    dense = build_optimizer(Dense(), OPTIM, model, example)
    sparse = build_optimizer(SCLMethod(lam=0.1, mask_lr=1e-3), OPTIM, model, example)
    assert without_decay(dense) == without_decay(sparse)
    names = {n for n, p in model.named_parameters() if id(p) in without_decay(dense)}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= names
    assert not {"patch_embed.proj.weight", "head.weight"} & names


METHODS: list[dict[str, Any]] = [
    {"name": "dense"},
    {"name": "scl", "lam": 0.1},
    *({"name": n, **kind.example} for n, kind in known_methods().items() if kind.example),
]


@pytest.mark.parametrize("settings", METHODS, ids=[m["name"] for m in METHODS])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_each_method_takes_what_its_rule_of_the_weights_uses(
    settings: dict[str, Any], rule: str
) -> None:
    """And nothing else, which optimizers refuse."""
    optim = OptimConfig.model_validate(
        {"name": rule, "global_batch_size": 8, "epochs": 1, "lr": 0.1}
        | ({"betas": (0.8, 0.9), "eps": 1e-6} if rule == "adamw" else {"momentum": 0.7})
    )
    method = TypeAdapter(MethodConfig).validate_python(settings)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    method = method.for_run(Schedule(), 100)
    group = build_optimizer(method, optim, model, torch.zeros(1, 4)).param_groups[0]
    if rule == "adamw":
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
    else:
        assert (group["momentum"], group["nesterov"]) == (0.7, True)
