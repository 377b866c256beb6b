"""Interrupted is uninterrupted, for any method."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sclcore.driver.optimizer import Driver
from tests.sclcore.nets import Mixed


def assert_goes_on_bit_for_bit(
    make: Callable[[nn.Module], Driver],
    train: Callable[..., object],
    batches: list[tuple[Tensor, Tensor]],
    cut: int,
) -> Driver:
    """Training on `batches`, and the same from what was saved after `cut` of them; the first."""
    torch.manual_seed(0)
    whole = Mixed()
    first, other = copy.deepcopy(whole), Mixed()
    optimizer = make(whole)
    train(whole, optimizer, batches)
    interrupted = make(first)
    train(first, interrupted, batches, range(cut))
    resumed = make(other)
    other.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    train(other, resumed, batches, range(cut, len(batches)))
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.mask_hash() == resumed.mask_hash()
    return optimizer
