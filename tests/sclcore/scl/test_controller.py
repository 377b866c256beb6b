"""λ steered to a density: the law alone, on a known plant, and on a network that learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.scl.controller import (
    Steering,
    TargetController,
    decay_at,
    line,
    next_steering,
    share_above,
    slope,
)
from tests.sclcore.nets import mlp_batches, train


@pytest.mark.parametrize("seed", range(5))
def test_the_value_above_which_a_share_lies(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1000, generator=generator)
    weights = torch.randint(1, 50, (1000,), generator=generator).float()
    for share in (0.01, 0.2, 0.9):
        q = share_above(values, weights, share)
        assert float(weights[values > q].sum()) < share * float(weights.sum())
        assert float(weights[values >= q].sum()) >= share * float(weights.sum())
        even = share_above(values, torch.ones(1000), share)
        assert int((values > even).sum()) == round(1000 * share) - 1


def test_the_line_lands_softly() -> None:
    assert line(0.0) == 1.0 and line(1.0) == 0.0 and slope(1.0) == 0.0
    for at in (0.1, 0.5, 0.699, 0.701, 0.9, 0.99):
        assert (line(at + 1e-6) - line(at - 1e-6)) / 2e-6 == pytest.approx(slope(at), abs=1e-4)


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize("drift", [-0.1, 0.0, 0.5])
def test_the_quantile_arrives_whatever_drifts(start: float, drift: float) -> None:
    """dq/dtravel = -reach · (λ + gradient) with a gradient that the controller does not know.

    It grows to twice what it was in the course of the run.
    """
    reach, steps = 7.0, 2000
    state, quantile = Steering(start), 1.0
    for step in range(1, steps + 1):
        travel = step / steps
        quantile -= reach * (state.lam - 0.2 - drift * (0.5 + 0.5 * travel)) / steps
        if step % 20 == 0:
            decay = decay_at(travel, fastest=0.02)
            state = next_steering(state, travel, quantile, start=1.0, reach=reach, decay=decay)
    assert abs(quantile) < 0.03
    assert state.lam == pytest.approx(0.2 + drift, abs=0.1), "what holds q where it is"


def test_lambda_stays_above_zero() -> None:
    """Where connections die faster than is wanted without any λ, it can only wait."""
    state = next_steering(Steering(0.1), 0.5, -2.0, start=1.0, reach=7.0, decay=0.1)
    assert state.lam == 0.0


def wide_mlp() -> nn.Module:
    """8 → 64 → 4, 768 connections: a few per cent of them can be told apart."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))


def run(target: float, weights: dict[str, float] | None = None) -> tuple[float, list[float], SCL]:
    """(share that is live at the end, λ of each step, optimizer)."""
    model = wide_mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.0, mask_lr=0.002)
    schedule = Schedule(freeze_masks_at=0.6, lr_warmup=0.0)
    scheduler = Scheduler(optimizer, schedule)
    steps = 600
    names = optimizer.param_groups[0]["names"]
    controller = TargetController(
        optimizer,
        target=target,
        weights=weights or dict.fromkeys(names, 1.0),
        steps=schedule.mask_steps(steps),
    )
    state, course = controller.start, []
    for step, batch in zip(range(steps), mlp_batches(steps), strict=True):
        scheduler.set_progress(step / steps)
        state = controller.steer(schedule.mask_travel(step / steps), state)
        optimizer.param_groups[0]["lam"] = state.lam
        train(model, optimizer, [batch])
        course.append(state.lam)
    return controller.reached(), course, optimizer


@pytest.mark.parametrize("target", [0.2, 0.1])
def test_a_network_ends_at_its_target(target: float) -> None:
    reached, course, optimizer = run(target)
    # A network of 768 connections: 4 of them are 5 % of the smallest target.
    assert reached == pytest.approx(target, rel=0.06)
    live = sum(int(m.sum()) for m in optimizer.masks().values())
    total = sum(m.numel() for m in optimizer.masks().values())
    assert live / total == reached
    # λ changes only at acts, and no longer once the masks are final.
    assert len(set(course)) <= 101 and len(set(course[360:])) == 1
    assert math.isfinite(max(course)) and min(course) >= 0


def test_weights_decide_what_is_counted() -> None:
    """Where connections of one layer count for nothing, the share is that of the others."""
    names = [name for name, p in wide_mlp().named_parameters() if p.ndim > 1]
    weights = {name: float(i == 0) for i, name in enumerate(names)}
    reached, _, optimizer = run(0.2, weights)
    first: Tensor = optimizer.masks()[names[0]]
    assert reached == pytest.approx(float(first.float().mean()), rel=1e-6)
    assert reached == pytest.approx(0.2, rel=0.06)
