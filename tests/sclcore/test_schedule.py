"""Schedules are functions of progress, and the Scheduler applies them to any optimizer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sclcore import SCL, Schedule, Scheduler, connection_groups
from tests.sclcore.nets import mlp, mlp_batches, train

_GRID = [i / 1000 for i in range(1001)]


def test_lr_warms_up_linearly_then_follows_half_a_cosine() -> None:
    schedule = Schedule(lr="cosine", lr_warmup=0.2)
    assert schedule.lr_factor(0.0) == 0.0
    assert schedule.lr_factor(0.05) == pytest.approx(0.25)
    assert schedule.lr_factor(0.2) == pytest.approx(1.0)
    assert schedule.lr_factor(0.6) == pytest.approx(0.5)  # half of what is left
    assert schedule.lr_factor(0.4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.lr_factor(1.0) == pytest.approx(0.0, abs=1e-12)


def test_lr_floor() -> None:
    schedule = Schedule(lr="cosine", lr_warmup=0.0, lr_floor=0.1)
    assert schedule.lr_factor(0.0) == 1.0
    assert schedule.lr_factor(0.5) == pytest.approx(0.55)
    assert schedule.lr_factor(1.0) == pytest.approx(0.1)


def test_lr_step() -> None:
    schedule = Schedule(lr="step", lr_warmup=0.0, lr_milestones=[0.5, 0.75], lr_gamma=0.1)
    values = [schedule.lr_factor(p) for p in (0.0, 0.499, 0.5, 0.749, 0.75, 1.0)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_lr_constant() -> None:
    schedule = Schedule(lr="constant", lr_warmup=0.1)
    assert [schedule.lr_factor(p) for p in (0.05, 0.1, 0.7, 1.0)] == pytest.approx([0.5, 1, 1, 1])


def test_lam_warmup() -> None:
    assert [Schedule(lam_warmup=0.0).lam_factor(p) for p in (0.0, 0.5, 1.0)] == [1, 1, 1]
    schedule = Schedule(lam_warmup=0.4)
    values = [schedule.lam_factor(p) for p in (0.0, 0.1, 0.4, 0.9)]
    assert values == pytest.approx([0, 0.25, 1, 1])


def test_masks_freeze() -> None:
    schedule = Schedule(freeze_masks_at=0.7)
    assert [schedule.mask_lr_factor(p) for p in (0.0, 0.699, 0.7, 1.0)] == [1, 1, 0, 0]
    assert [schedule.masks_are_final(p) for p in (0.699, 0.7)] == [False, True]
    assert Schedule(freeze_masks_at=0.0).mask_lr_factor(0.0) == 0.0
    assert Schedule(freeze_masks_at=1.0).mask_lr_factor(0.999) == 1.0


def test_mask_lr_cosine_reaches_zero_where_the_masks_freeze() -> None:
    schedule = Schedule(mask_lr="cosine", freeze_masks_at=0.8)
    assert schedule.mask_lr_factor(0.0) == 1.0
    assert schedule.mask_lr_factor(0.4) == pytest.approx(0.5)
    assert schedule.mask_lr_factor(0.7999) == pytest.approx(0, abs=1e-4)
    assert schedule.mask_lr_factor(0.8) == 0.0


@pytest.mark.parametrize("lr", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.99])
def test_factors_stay_between_0_and_1_and_lr_falls_after_its_warmup(lr: Any, warmup: float) -> None:
    schedule = Schedule(lr=lr, lr_warmup=warmup, lam_warmup=1.0, mask_lr="cosine")
    for factor in (schedule.lr_factor, schedule.lam_factor, schedule.mask_lr_factor):
        assert all(0 <= factor(p) <= 1 for p in _GRID)
    after = [schedule.lr_factor(p) for p in _GRID if p >= warmup]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": "exponential"},
        {"lr_warmup": 1.0},
        {"lr_warmup": -0.1},
        {"lr_floor": 1.5},
        {"lr_gamma": 0.0},
        {"lr_milestones": [0.3, 30]},
        {"lam_warmup": 2.0},
        {"mask_lr": "step"},
        {"freeze_masks_at": 1.1},
        {"freeze_mask_at": 0.5},  # a typing error
    ],
    ids=lambda o: "-".join(o),
)
def test_invalid_schedules_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        Schedule(**options)


def test_scheduler_multiplies_each_groups_own_base_values() -> None:
    groups = connection_groups(mlp(), lam=0.4, mask_lr=0.02)
    groups[1]["lr"] = 0.5
    optimizer = SCL(groups, lr=0.1, lam=0.1)
    schedule = Schedule(lr_warmup=0.2, lam_warmup=0.5, freeze_masks_at=0.6)
    scheduler = Scheduler(optimizer, schedule)
    scheduler.set_progress(0.1)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == pytest.approx((0.05, 0.25))
    assert first["lam"] == pytest.approx(0.08)
    assert first["mask_lr"] == pytest.approx(0.02)
    scheduler.set_progress(0.8)
    assert first["mask_lr"] == 0.0
    # No state: going back gives what was there, nothing has been multiplied twice.
    scheduler.set_progress(0.1)
    assert (first["lr"], second["lr"], first["mask_lr"]) == pytest.approx((0.05, 0.25, 0.02))


def test_scheduler_serves_other_optimizers() -> None:
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.2)
    Scheduler(optimizer, Schedule(lr_warmup=0.0)).set_progress(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert "lam" not in optimizer.param_groups[0]


class Twice(torch.optim.SGD):
    """Goes through the schedule of the learning rate twice."""

    def lr_progress(self, progress: float) -> float:
        return 2 * progress % 1


def test_an_optimizer_may_say_where_in_the_schedule_of_lr_it_is() -> None:
    schedule = Schedule(lr_warmup=0.1)
    optimizer = Twice(mlp().parameters(), lr=0.2)
    scheduler = Scheduler(optimizer, schedule)
    for progress, place in ((0.05, 0.1), (0.3, 0.6), (0.5, 0.0), (0.75, 0.5)):
        scheduler.set_progress(progress)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * schedule.lr_factor(place))


def test_a_resumed_run_sees_the_same_values() -> None:
    """Scheduler made before the state is loaded, as a run does that starts and then resumes."""
    schedule = Schedule(lr_warmup=0.1, lam_warmup=0.3)
    optimizer = SCL(connection_groups(mlp()), lr=0.1, lam=0.1)
    scheduler = Scheduler(optimizer, schedule)
    scheduler.set_progress(0.4)
    fresh = SCL(connection_groups(mlp()), lr=0.1, lam=0.1)
    resumed = Scheduler(fresh, schedule)
    fresh.load_state_dict(optimizer.state_dict())
    for progress in (0.5, 0.69, 0.9):
        scheduler.set_progress(progress)
        resumed.set_progress(progress)
        for a, b in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            assert (a["lr"], a["lam"], a["mask_lr"]) == (b["lr"], b["lam"], b["mask_lr"])


def test_a_scheduled_run_freezes_its_masks() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.3, mask_lr=0.02)
    scheduler = Scheduler(optimizer, Schedule(freeze_masks_at=0.5))
    hashes = []
    steps = 60

    def advance(index: int) -> None:
        hashes.append(optimizer.mask_hash())
        scheduler.set_progress((index + 1) / steps)

    scheduler.set_progress(0.0)
    train(model, optimizer, mlp_batches(steps), advance)
    assert len(set(hashes[:30])) > 10
    assert len(set(hashes[29:])) == 1
