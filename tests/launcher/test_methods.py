"""A method is its optimizer: what all of them have in common."""

from __future__ import annotations

import timm
import torch
from torch.optim import Optimizer

from launcher.recipe.method import DenseMethod, OptimConfig, SCLMethod
from launcher.run.optimizer import build_optimizer

OPTIM = OptimConfig(global_batch_size=8, epochs=1, lr=0.1, name="adamw", weight_decay=0.05)


def without_decay(optimizer: Optimizer) -> set[int]:
    groups = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    return {id(parameter) for group in groups for parameter in group["params"]}


def test_the_same_parameters_are_decayed_with_masks_and_without() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    example = torch.zeros(1, 3, 32, 32)
    dense = build_optimizer(DenseMethod(name="dense"), OPTIM, model, example)
    sparse = build_optimizer(SCLMethod(name="scl", lam=0.1), OPTIM, model, example)
    assert without_decay(dense) == without_decay(sparse)
    names = {n for n, p in model.named_parameters() if id(p) in without_decay(dense)}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= names
    assert not {"patch_embed.proj.weight", "head.weight"} & names
