"""A loop of one's own for methods that draw gates and look at the network several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sclcore.driver.optimizer import Driver


def gated_step(model: nn.Module, optimizer: Driver, batch: tuple[Tensor, Tensor]) -> None:
    """One update with all its passes, as a training loop makes it."""
    images, labels = batch
    optimizer.zero_grad()
    optimizer.before_update()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.add_loss(0, loss)
    for number in range(1, optimizer.passes):
        optimizer.before_pass(number)
        with torch.no_grad():
            optimizer.add_loss(number, nn.functional.cross_entropy(model(images), labels))
    optimizer.before_pass(0)
    optimizer.step()


def gated_training(
    model: nn.Module,
    optimizer: Driver,
    batches: list[tuple[Tensor, Tensor]],
    steps: range | None = None,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """Updates `steps` of a run over all `batches`."""
    for step in steps if steps is not None else range(len(batches)):
        for group in optimizer.param_groups:
            group["progress"] = step / len(batches)
        gated_step(model, optimizer, batches[step])
        each(step)
