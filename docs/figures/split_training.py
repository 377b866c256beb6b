"""One run of a recipe on a split of the digits, without the engine; about five seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.defaults import shifted
from launcher.models import create_model
from launcher.recipe.recipe import Recipe
from launcher.run.optimizer import build_optimizer
from sclcore import Scheduler
from sclcore.methods.dense import Dense

_HELD_BACK = 450

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """One split: standardised images [N, 1, 8, 8], labels [N], and which are trained on."""

    images: Tensor
    labels: Tensor
    train: Tensor
    held_back: Tensor


def split(number: int) -> Digits:
    stored: Any = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32)[:, None]
    order = torch.from_numpy(np.random.default_rng(number).permutation(len(images)))
    train = order[_HELD_BACK:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images, torch.tensor(stored.target), train, order[:_HELD_BACK])


def train(recipe: Recipe, digits: Digits, seed: int, masks: Masks | None = None) -> nn.Module:
    """The network at the end; with `masks`, trained densely but for the connections they lack."""
    torch.manual_seed(seed)
    model = create_model(recipe.model, num_classes=10, in_chans=1)
    method = recipe.method if masks is None else Dense()
    optimizer = build_optimizer(method, recipe.optim, model, torch.empty(1, 1, 8, 8))
    scheduler = Scheduler(optimizer, recipe.schedule)
    generator = torch.Generator().manual_seed(seed)
    batch = recipe.optim.global_batch_size
    steps = len(digits.train) // batch
    _apply(masks, model)
    for epoch in range(recipe.optim.epochs):
        order = digits.train[torch.randperm(len(digits.train), generator=generator)]
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            scheduler.set_progress((epoch + step / steps) / recipe.optim.epochs)
            optimizer.zero_grad()
            images = shifted(digits.images[chosen], generator)
            cross_entropy(model(images), digits.labels[chosen]).backward()
            optimizer.step()
            _apply(masks, model)
    return model


@torch.no_grad()
def _apply(masks: Masks | None, model: nn.Module) -> None:
    for name, mask in (masks or {}).items():
        model.get_parameter(name).mul_(mask)


@torch.no_grad()
def top1(model: nn.Module, digits: Digits) -> float:
    model.eval()
    found = model(digits.images[digits.held_back]).argmax(1)
    return float((found == digits.labels[digits.held_back]).float().mean())


def structure(model: nn.Module) -> Masks:
    """Which weights of convolutions and linear layers are not 0."""
    return {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}


def density(masks: Masks) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
