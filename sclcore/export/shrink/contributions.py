"""What each unit contributes to the answer for a sample: activation × gradient where it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sclcore.export.shrink.units import Reader, Units

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, classes], labels [n]) → one number for each sample, [n]."""


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample, in nats."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The log odds of the right class: its logit less the logsumexp of all others.

    Unlike the gradient of the loss, that of the margin does not vanish where a sample is learned.
    """
    right = nn.functional.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(right, -torch.inf)
    return logits[right] - others.logsumexp(1)


def contributions(
    model: nn.Module,
    units: Units,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Objective = cross_entropies,
) -> Tensor:
    """What each unit contributes to `objective` for each sample, to first order: [samples, units].

    Σ x · ∂objective/∂x over all places where a Linear or convolution reads the unit's activation
    x: the derivative by a gate, now 1, on the unit (Molchanov et al., arXiv 1906.10771, section
    3). Evaluation mode, so that samples do not mix. `batches` are images and labels; the model
    stays as it is.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    read: list[tuple[Reader, Tensor]] = []
    handles = []
    for reader in {r.module: r for r in units.readers}.values():
        hook = partial(_pass_on, reader, read)
        handles.append(model.get_submodule(reader.module).register_forward_pre_hook(hook))
    found = []
    try:
        with torch.enable_grad():
            for images, labels in batches:
                read.clear()
                # The first layer's input as well: a graph begins there.
                total = objective(model(images), labels).sum()
                gradients = torch.autograd.grad(total, [x for _, x in read], allow_unused=True)
                found.append(_by_unit(units.count, len(images), read, gradients))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def _pass_on(
    reader: Reader, read: list[tuple[Reader, Tensor]], module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Give the layer a copy of its input: of its own, and never changed in place."""
    copied = inputs[0].clone() if inputs[0].requires_grad else inputs[0].clone().requires_grad_()
    read.append((reader, copied))
    return (copied, *inputs[1:])


@torch.no_grad()
def _by_unit(
    count: int,
    samples: int,
    read: list[tuple[Reader, Tensor]],
    gradients: tuple[Tensor | None, ...],
) -> Tensor:
    total = torch.zeros(samples, count + 1)
    for (reader, x), gradient in zip(read, gradients, strict=True):
        if gradient is None:
            continue
        product = x * gradient
        features = x.shape[reader.dim]
        summed = product.movedim(reader.dim, -1).reshape(samples, -1, features).sum(1)
        # What belongs to no unit is gathered behind the last, and dropped.
        places = torch.where(reader.units < 0, count, reader.units)
        total.index_add_(1, places, summed.float().cpu())
    return total[:, :count]


def sensitivity(contributed: Tensor) -> Tensor:
    """Mean square of a unit's contributions over the samples: [units]; what its loss may cost."""
    return contributed.double().square().mean(0)
