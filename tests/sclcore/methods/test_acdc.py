"""AC/DC against a plain loop over its phases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import Schedule, Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.acdc import ACDC
from tests.sclcore.methods.resumed import assert_goes_on_bit_for_bit
from tests.sclcore.nets import mixed_batches, mlp, mlp_batches, mse_step

SCHEDULE = Schedule(lr_warmup=0.1)
NAMES = ("0.weight", "2.weight")


def driver(model: nn.Module, rule: str = "sgd", **options: Any) -> Driver:
    weights: dict[str, Any] = {"momentum": 0.9} if rule == "sgd" else {}
    method = ACDC.model_validate({"density": 0.2} | options)
    groups = connection_groups(model)
    return Driver(method, groups, lr=0.05, weight_decay=1e-2, weight_rule=rule, **weights)


def train(
    model: nn.Module,
    optimizer: Driver,
    batches: list[tuple[Tensor, Tensor]],
    steps: range | None = None,
) -> list[int]:
    """As the launcher does; how many connections live in each forward pass."""
    scheduler, live = Scheduler(optimizer, SCHEDULE), []
    for step in steps or range(len(batches)):
        scheduler.set_progress(step / len(batches))
        optimizer.before_update()
        live.append(sum(optimizer.live_connections().values()))
        mse_step(model, optimizer, batches[step])
    return live


def test_the_phases_are_those_of_its_program() -> None:
    """Of 100 epochs: sparse from 10 to 15, 20 to 25, … 70 to 75, and from 85 on."""
    model = mlp()
    live = train(model, driver(model), mlp_batches(100))
    sparse = [epoch for epoch, count in enumerate(live) if count == round(0.2 * 192)]
    assert {*live} == {192, round(0.2 * 192)}
    assert sparse == [e for e in range(100) if e >= 85 or (10 <= e < 75 and e % 10 < 5)]


def test_it_is_sgd_with_the_smallest_removed_at_each_sparse_phase() -> None:
    model, batches = mlp(dtype=torch.float64), mlp_batches(60, dtype=torch.float64)
    book = copy.deepcopy(model)
    optimizer = driver(model, begin=0.2, phase=0.1, last_dense=0.7, end=0.8)
    decayed = [p for p in book.parameters() if p.ndim > 1]
    others = [p for p in book.parameters() if p.ndim == 1]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-2}, {"params": others}], lr=0.05, momentum=0.9
    )
    scheduler = Scheduler(sgd, SCHEDULE)
    masks = [torch.ones_like(p) for p in decayed]
    for step in range(60):
        scheduler.set_progress(step / 60)
        if step in (12, 24, 36, 48):
            sizes = torch.cat([p.detach().abs().flatten() for p in decayed])
            bound = sizes.sort(descending=True).values[round(0.2 * 192) - 1]
            masks = [(p.detach().abs() >= bound).double() for p in decayed]
            for p, mask in zip(decayed, masks, strict=True):
                p.data *= mask
                sgd.state[p]["momentum_buffer"] *= mask
        elif step in (18, 30, 42):
            masks = [torch.ones_like(p) for p in decayed]
        sgd.zero_grad()
        nn.functional.mse_loss(book(batches[step][0]), batches[step][1]).backward()
        for p, mask in zip(decayed, masks, strict=True):
            assert p.grad is not None
            p.grad *= mask
        sgd.step()

    train(model, optimizer, batches)
    for (name, p), q in zip(model.named_parameters(), book.parameters(), strict=True):
        # To rounding in double.
        assert torch.allclose(p, q, rtol=0, atol=1e-12), name
        assert name not in NAMES or torch.equal(p != 0, q != 0), name


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [13, 17])
def test_what_is_saved_goes_on_bit_for_bit(rule: str, cut: int) -> None:
    """Interrupted within a sparse phase, and within a dense one."""
    batches = mixed_batches(torch.float32, 30)
    make = lambda model: driver(model, rule, begin=0.4, phase=0.1)  # noqa: E731
    assert_goes_on_bit_for_bit(make, train, batches, cut)


def test_masks_are_final_once_the_last_sparse_phase_has_begun() -> None:
    method = ACDC(density=0.1)
    final = [step for step in range(101) if method.masks_are_final(SCHEDULE, step, 100)]
    assert final == [*range(86, 101)]


def test_phases_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="begin, last_dense and end must rise"):
        ACDC(density=0.1, last_dense=0.9)
