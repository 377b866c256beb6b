"""A course to a density: what may live at each moment, and a network that learns under it."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.scl.controller import Steering, TargetController, wanted
from tests.sclcore.nets import mlp_batches, train


def test_the_course_waits_falls_and_stays() -> None:
    assert [wanted(at, 0.04) for at in (0.0, 0.25)] == [1.0, 1.0]
    assert wanted(0.525, 0.04) == pytest.approx(0.04 + 0.96 / 8), "half-way, by a cubic law"
    assert [wanted(at, 0.04) for at in (0.8, 1.0)] == [0.04, 0.04]


def test_what_an_older_version_saved_is_understood() -> None:
    old = {"lam": 0.3, "travel": 0.4, "late": 0.2, "is_final": True}
    assert Steering.of(old) == Steering(0.3, is_final=True)
    assert Steering.of({"lam": 0.3, "travel": 0.4, "error": 0.1}) == Steering(0.3)
    assert Steering.of(asdict(Steering(0.2))) == Steering(0.2)


def wide_mlp() -> nn.Module:
    """8 → 64 → 4, 768 connections: a few per cent of them can be told apart."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))


def run(
    target: float, weights: dict[str, float] | None = None
) -> tuple[TargetController, list[tuple[float, float]], SCL]:
    """(controller, (share that is live, λ) of each step, optimizer)."""
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
    )
    state, course = Steering(), []
    for step, batch in zip(range(steps), mlp_batches(steps), strict=True):
        scheduler.set_progress(step / steps)
        state = controller.steer(schedule.mask_travel(step / steps), state)
        optimizer.param_groups[0]["lam"] = state.lam
        train(model, optimizer, [batch])
        course.append((controller.reached(), state.lam))
    return controller, course, optimizer


@pytest.mark.parametrize("target", [0.2, 0.1])
def test_a_network_follows_the_course_and_ends_at_its_target(target: float) -> None:
    _, course, optimizer = run(target)
    live = sum(int(m.sum()) for m in optimizer.masks().values())
    total = sum(m.numel() for m in optimizer.masks().values())
    assert live == round(target * total) and live / total == course[-1][0]
    for step, (share, lam) in enumerate(course[:360]):
        assert round(share * total) <= round(wanted(step / 360, target) * total)
        assert lam >= 0 and math.isfinite(lam)
    assert max(lam for _, lam in course) > 0.05, "what was asked for does not come by itself"
    assert course[359][0] > 0.8 * target, "little is left to the choice"
    assert len(set(course[360:])) == 1, "nothing moves once the masks are final"


def test_weights_decide_what_is_counted() -> None:
    """Where connections of one layer count for nothing, the share is that of the others."""
    names = [name for name, p in wide_mlp().named_parameters() if p.ndim > 1]
    weights = {name: float(i == 0) for i, name in enumerate(names)}
    _, course, optimizer = run(0.2, weights)
    first: Tensor = optimizer.masks()[names[0]]
    assert course[-1][0] == pytest.approx(float(first.float().mean()), rel=1e-6)
    assert int(first.sum()) == round(0.2 * first.numel())
