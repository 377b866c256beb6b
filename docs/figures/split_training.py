"""One run of a recipe on a split of the digits, without the engine; about five seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks import front_training
from benchmarks.front_training import Images, Masks, density, structure
from launcher.recipe.recipe import Recipe
from sclcore.methods.dense import Dense

__all__ = ["density", "split", "structure", "top1", "train"]

_HELD_BACK = 450


def split(number: int) -> Images:
    """Split `number` of scikit-learn's digits: 450 are held back."""
    stored: Any = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32)[:, None]
    order = torch.from_numpy(np.random.default_rng(number).permutation(len(images)))
    train = order[_HELD_BACK:]
    images = (images - images[train].mean()) / images[train].std()
    return Images(images, torch.tensor(stored.target), train, order[:_HELD_BACK], margin=1)


def train(recipe: Recipe, digits: Images, seed: int, masks: Masks | None = None) -> nn.Module:
    """The network at the end; with `masks`, trained densely but for the connections they lack."""
    if masks is None:
        return front_training.train(recipe, digits, seed)
    dense = recipe.model_copy(update={"method": Dense()})
    return front_training.train(dense, digits, seed, lambda model: _apply(masks, model))


@torch.no_grad()
def _apply(masks: Masks, model: nn.Module) -> None:
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def top1(model: nn.Module, digits: Images) -> float:
    return front_training.evaluate(model, digits)[0]
