"""λ steered to a density: the law alone, on a known plant, and on a network that learns."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.scl.controller import (
    Plant,
    Steering,
    TargetController,
    share_above,
    wanted,
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


def test_the_course_waits_falls_and_stays() -> None:
    assert [wanted(at, 0.04) for at in (0.0, 0.25)] == [1.0, 1.0]
    assert wanted(0.525, 0.04) == pytest.approx(0.04 + 0.96 / 8), "half-way, by a cubic law"
    assert [wanted(at, 0.04) for at in (0.8, 1.0)] == [0.04, 0.04]


@pytest.mark.parametrize("memory", [0, 9, 30])
@pytest.mark.parametrize("drift", [-0.3, -0.1, 0.0])
def test_the_quantile_arrives_whatever_drifts_and_stays(drift: float, memory: int) -> None:
    """A quantile that λ moves with the delay of momentum, and a gradient that is not known."""
    steps, reach = 2000, 7.0
    plant = Plant(start=1.0, reach=reach, memory=memory / steps)
    kept = memory / (1 + memory)
    state, quantile, late = Steering(1.0 / reach / 0.25), 1.0, 0.0
    seen: list[float] = []
    for step in range(steps):
        travel = step / steps
        if step and step % 20 == 0:
            state = plant.next(state, travel, travel + max(20, memory) / steps, quantile)
            seen.append(quantile)
            assert not memory or state.late == pytest.approx(late, rel=0.05, abs=0.02)
        late = kept * late + (1 - kept) * state.lam
        quantile -= reach * (late + drift * (0.5 + 0.5 * travel)) / steps
    # On the way down it is where it should be once momentum has come along, and from a quarter on
    # at 0: to within what the unknown gradient does between two acts, 0.02, and what momentum
    # has still to add.
    coming = reach * memory / steps * 0.6
    assert seen[9] == pytest.approx(1 - 0.1 / 0.25 + coming, abs=0.05)
    assert max(abs(q) for q in seen[30:]) < 0.03 + reach * memory / steps * 0.6


def test_lambda_stays_above_zero() -> None:
    """Where connections die faster than is wanted without any λ, it can only wait."""
    plant = Plant(start=1.0, reach=7.0, memory=0.01)
    assert plant.next(Steering(0.1), 0.5, 0.51, -2.0).lam == 0.0


def test_what_an_older_version_saved_goes_on_from_its_lambda() -> None:
    assert Steering.of({"lam": 0.3, "travel": 0.4, "error": 0.1}) == Steering(0.3, 0.4, 0.3)
    assert Steering.of(asdict(Steering(0.3, 1.0, 0.2, True))) == Steering(0.3, 1.0, 0.2, True)


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
    live = sum(int(m.sum()) for m in optimizer.masks().values())
    total = sum(m.numel() for m in optimizer.masks().values())
    assert live == round(target * total) and live / total == reached
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
    assert int(first.sum()) == round(0.2 * first.numel())
