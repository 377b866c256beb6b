"""What a run needs of memory, counted on the meta device: nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launcher.recipe.recipe import Recipe
from launcher.run.optimizer import build_optimizer
from sclcore import SCL
from sclcore.network.connections import layer_budgets, weight_uses
from sclcore.optim.settings import buffers_of


@dataclass(frozen=True)
class Size:
    """What a network is, per image where it depends on images."""

    parameters: int
    connections: int
    macs: int
    activations: int
    """Bytes kept for the backward pass, at 2 bytes a number; 0 where that cannot be counted."""


@dataclass(frozen=True)
class State:
    """Bytes: weights, gradients, and what the optimizer keeps of them."""

    weights: int
    optimizer: int

    def per_rank(self, stage: int, ranks: int) -> float:
        """ZeRO 1 shares out optimizer state and trains a float32 slice; 2 the gradients as well.

        Stage 3 the weights besides, of which an eighth is whole at a time (launcher/run/zero3.py);
        an update lays the gradients end to end once more.
        """
        if stage == 0:
            return 2 * self.weights + self.optimizer
        slices = (self.optimizer + self.weights) / ranks
        if stage == 3:
            return self.weights / 8 + slices + 3 * self.weights / ranks
        gradients = self.weights / ranks if stage == 2 else self.weights
        return self.weights + gradients + slices


def size_of(model: nn.Module, image: Tensor) -> Size:
    budgets = layer_budgets(model, weight_uses(model, image))
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        connections=sum(b.connections for b in budgets),
        macs=sum(b.macs for b in budgets),
        activations=_activations(model, image),
    )


def _activations(model: nn.Module, image: Tensor) -> int:
    try:
        return saved_for_backward(model, image) // 2
    # A choice that depends on values, which only a real pass has.
    except (RuntimeError, NotImplementedError):
        return 0


def saved_for_backward(model: nn.Module, image: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass of one image in float32, parameters aside.

    Two images less one, since some of what is kept does not grow with the batch.
    """

    def kept(batch: int) -> int:
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(image.expand(batch, *image.shape[1:]))
        total = sum(sizes.values())
        # Until here it kept alive what was counted, or an address could have come twice.
        del output
        return total

    model.train()
    return kept(3) - kept(2)


def state_of(recipe: Recipe, model: nn.Module, image: Tensor) -> State:
    """In float32, as `autocast` trains."""
    optimizer = build_optimizer(
        recipe.method.for_run(recipe.schedule, 1000), recipe.optim, model, image
    )
    floats = 0
    for group in optimizer.param_groups:
        numel = sum(p.numel() for p in group["params"])
        if isinstance(optimizer, SCL):
            # w, m and its momentum, besides what the rule for weights keeps.
            kept = 3 * group["connections"] + len(buffers_of(group))
        else:
            kept = 2 if recipe.optim.name == "adamw" else 1
        floats += kept * numel
    weights = 4 * sum(p.numel() for p in model.parameters())
    return State(weights, 4 * floats)
