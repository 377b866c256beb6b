"""Snapshots count right, and each named warning comes from a real training that deserves it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.telemetry import MaskHealth, observation_metrics, snapshot
from tests.sclcore.nets import mlp, mlp_batches, train

_STEPS = 200


def _check(health: MaskHealth, progress: float, optimizer: SCL) -> list[str]:
    """What a training loop does after a step, given an optimizer that is observing."""
    revivals = observation_metrics(optimizer.observations).get("masks/revivals")
    optimizer.observations.clear()
    return health.check(
        progress, snapshot(optimizer), held_layers=optimizer.held_layers, revivals=revivals
    )


def _warnings(schedule: Schedule | None = None, steps: int = _STEPS, **options: Any) -> list[str]:
    """All warnings of a whole run, as a training loop would ask for them."""
    model = mlp()
    defaults = {"lr": 0.05, "lam": 0.05, "mask_lr": 0.003}
    optimizer = SCL(connection_groups(model), **{**defaults, **options})
    schedule = schedule or Schedule()
    scheduler = Scheduler(optimizer, schedule)
    optimizer.observing = True
    health = MaskHealth(schedule.freeze_masks_at)
    found: list[str] = []

    def after(index: int) -> None:
        progress = (index + 1) / steps
        found.extend(_check(health, progress, optimizer))
        scheduler.set_progress(progress)

    scheduler.set_progress(0.0)
    train(model, optimizer, mlp_batches(steps), after)
    return found


def _names(warnings: list[str]) -> list[str]:
    return [w.split(":")[0] for w in warnings]


def test_a_healthy_run_warns_of_nothing() -> None:
    assert _warnings() == []


def test_layer_collapse() -> None:
    found = _warnings(lam=3.0)
    assert _names(found) == ["layer-collapse", "layer-collapse"], "once per layer"
    assert "0.weight" in " ".join(found) and "2.weight" in " ".join(found)
    assert "keeps the 1 best of 128" in " ".join(found)


def test_layer_collapse_names_only_the_layer_that_collapses() -> None:
    model = mlp()
    groups = connection_groups(model)
    # The first layer alone is too dear.
    groups[0]["costs"] = [60.0, 1.0]
    optimizer = SCL(groups, lr=0.05, lam=0.05, mask_lr=0.003)
    health, found = MaskHealth(), []
    train(
        model,
        optimizer,
        mlp_batches(_STEPS),
        lambda i: found.extend(_check(health, (i + 1) / _STEPS, optimizer)),
    )
    assert _names(found) == ["layer-collapse"] and "0.weight lost" in found[0]


def test_nothing_moving() -> None:
    found = _warnings(lam=0.05, mask_lr=1e-6)
    assert _names(found) == ["nothing-moving"], "once, at half-time"
    assert "100.0%" in found[0]


def test_nothing_moving_is_not_said_before_half_time() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.0, mask_lr=1e-6)
    train(model, optimizer, mlp_batches(5))
    health = MaskHealth()
    assert health.check(0.49, snapshot(optimizer)) == []
    assert _names(health.check(0.5, snapshot(optimizer))) == ["nothing-moving"]
    assert health.check(0.6, snapshot(optimizer)) == [], "once per run"


def _borderline_run(schedule: Schedule) -> list[str]:
    """Connections that J cannot decide on: live they are pulled down, dead they are pulled up.

    Inputs are unit vectors, weights 1, targets 0.8, λ = 0.3 (test_theory has the algebra).
    """
    layer = nn.Linear(8, 4, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = SCL(
        connection_groups(layer),
        lr=1e-4,
        lam=0.3,
        mask_lr=0.2,
        mask_momentum=0.0,
        normalize="none",
        min_connections=0,
    )
    scheduler, health = Scheduler(optimizer, schedule), MaskHealth(schedule.freeze_masks_at)
    found: list[str] = []
    optimizer.observing = True
    for step in range(_STEPS):
        scheduler.set_progress(step / _STEPS)
        optimizer.zero_grad()
        (0.5 * (layer(torch.eye(8)) - 0.8).square().sum()).backward()
        optimizer.step()
        found += _check(health, (step + 1) / _STEPS, optimizer)
    return found


def test_flicker() -> None:
    found = _borderline_run(Schedule(freeze_masks_at=1.0))
    assert _names(found) == ["flicker"]
    assert "Lower mask_lr" in found[0]


def test_flicker_is_judged_while_masks_are_learned() -> None:
    assert _names(_borderline_run(Schedule(freeze_masks_at=0.45))) == ["flicker"]
    assert _borderline_run(Schedule(freeze_masks_at=0.0)) == [], "never learned, never flickered"


def test_flips_that_settle_are_no_flicker() -> None:
    """Large mask steps: much moves at first, less and less later, without any freeze."""
    found = _warnings(Schedule(freeze_masks_at=1.0), lam=0.02, mask_lr=1.0, mask_momentum=0.0)
    assert found == []


def test_a_late_wave_of_first_deaths_is_no_flicker() -> None:
    """λ brings the masks from 1 to 0 at 60 % of the run, where they die once and stay dead."""
    # Wide, so that one revival is no large share.
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 4))
    # Every mask variable falls by 0.5 · mask_lr / (1 − 0.9) a step, give or take its gradient.
    mask_lr = 1 / (0.5 * 10 * 0.6 * _STEPS)
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.5, mask_lr=mask_lr)
    optimizer.observing = True
    health, found = MaskHealth(), []
    before = optimizer.masks()
    revivals = 0

    def after(index: int) -> None:
        nonlocal before, revivals
        now = optimizer.masks()
        revivals += sum(int((now[n] & ~before[n]).sum()) for n in now)
        before = now
        found.extend(_check(health, (index + 1) / _STEPS, optimizer))

    train(model, optimizer, mlp_batches(_STEPS), after)
    dead = sum(int((~m).sum()) for m in before.values())
    assert dead > 800 and revivals < dead / 10, "a wave of deaths"
    assert "flicker" not in _names(found)


def test_lambda_too_large() -> None:
    # 2 % of the run are 4 steps; a step of the momentum's is 0.3 · 2 at first, m starts at 1.
    found = _warnings(lam=2.0, mask_lr=0.3, steps=200)
    assert "lambda-too-large" in _names(found)
    text = next(w for w in found if w.startswith("lambda-too-large"))
    assert "Lower lam or mask_lr" in text and "%" in text


def test_the_same_lambda_slowly_is_not_too_large() -> None:
    """The warning is about the speed: half gone at 2 %, not half gone."""
    found = _warnings(lam=0.3, mask_lr=0.003)
    assert "lambda-too-large" not in _names(found)


# --- snapshots ------------------------------------------------------------------------------------


def _with_masks(values: list[float]) -> SCL:
    """One Linear of 1 × n whose mask variables are `values`."""
    layer = nn.Linear(len(values), 1, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.0, lam=0.0, mask_lr=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    optimizer.mask_variables()["weight"].copy_(torch.tensor([values]))
    return optimizer


def test_snapshot_counts() -> None:
    shot = snapshot(_with_masks([-1.0, -0.05, 0.0, 0.05, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]))
    assert shot.live == {"weight": 7} and shot.connections == {"weight": 10}
    assert shot.density == pytest.approx(0.7)
    assert shot.near_zero == pytest.approx(0.3)
    metrics = shot.metrics()
    assert metrics["connections/live"] == 7 and metrics["density/weight"] == pytest.approx(0.7)


def test_snapshot_quantiles() -> None:
    values = [i / 100 for i in range(101)]
    shot = snapshot(_with_masks(values[::-1]))
    assert shot.quantiles == pytest.approx((0.05, 0.5, 0.95))
    # Sampled: every fifth one still is a fair picture, and counts stay exact.
    sampled = snapshot(_with_masks(values[::-1]), sample=20)
    assert sampled.quantiles == pytest.approx((0.05, 0.5, 0.95), abs=0.06)
    assert sampled.live == shot.live


def test_sampled_mask_variables_are_evenly_spaced_over_every_tensor() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)
    assert len(optimizer.sample_mask_variables(10)) == 0, "there are none before the first step"
    train(model, optimizer, mlp_batches(3))
    variables = optimizer.mask_variables()
    sample = optimizer.sample_mask_variables(24)
    assert torch.equal(sample, torch.cat([m.flatten()[::8] for m in variables.values()]))
    assert len(optimizer.sample_mask_variables(1_000_000)) == 192


def test_a_snapshot_gathers_no_whole_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be a message of the size of the model where state is sharded."""
    optimizer = _with_masks([0.5, -0.5])
    for method in ("masks", "mask_variables"):
        monkeypatch.setattr(optimizer, method, None)
    assert snapshot(optimizer).live == {"weight": 1}


def test_snapshot_before_the_first_step() -> None:
    optimizer = SCL(connection_groups(mlp()), lr=0.1, lam=0.1, mask_init=0.5)
    shot = snapshot(optimizer)
    assert shot.density == 1.0 and shot.quantiles == (0.5, 0.5, 0.5) and shot.near_zero == 0.0


def test_observation_metrics() -> None:
    layer = nn.Linear(2, 3, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = SCL(connection_groups(layer), lr=0.0, lam=0.0, mask_lr=0.8, mask_momentum=0.0)
    optimizer.observing = True
    # rms per feature 1, 4 and 0; after normalisation 1, 1 and 0. m: 1 − 0.8 stays, 1 + 0.8 too.
    layer.weight.grad = torch.tensor([[1.0, -1.0], [4.0, 4.0], [0.0, 0.0]])
    optimizer.step()
    metrics = observation_metrics(optimizer.observations)
    assert metrics["masks/flips"] == 0
    assert metrics["masks/dead_features"] == 1
    # Of the two features that live (1 and 4) torch takes the lower median, 1.
    assert metrics["masks/imbalance_before"] == pytest.approx(4)
    assert metrics["masks/imbalance_after"] == pytest.approx(1)
    optimizer.step()
    # Now the three with gradient above 0 go from 0.2 to −0.6.
    assert observation_metrics(optimizer.observations)["masks/flips"] == 3
    assert observation_metrics({}) == {}


def test_normalisation_removes_the_imbalance_of_a_real_network() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight[:, 3] *= 30  # so feature 3 of the first layer is loud
    optimizer = SCL(connection_groups(model), lr=0.01, lam=0.1)
    optimizer.observing = True
    train(model, optimizer, mlp_batches(3))
    metrics = observation_metrics(optimizer.observations)
    assert metrics["masks/imbalance_before"] > 3
    assert metrics["masks/imbalance_after"] == pytest.approx(1, abs=1e-3)
    assert all(math.isfinite(v) for v in metrics.values())
