"""Snapshots count right, and each named warning comes from a real training that deserves it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from sclcore.network.connections import layer_budgets, weight_uses
from sclcore.telemetry import (
    HISTOGRAM_EDGES,
    FlipCounter,
    MaskHealth,
    Snapshot,
    connection_metrics,
    hovering,
    observation_metrics,
    revivals,
    snapshot,
)
from tests.sclcore.nets import mlp, mlp_batches, train

_STEPS = 200


def _check(health: MaskHealth, progress: float, optimizer: SCL) -> list[str]:
    """What a training loop does after a step, given an optimizer that is observing."""
    came_back = revivals(optimizer.observations)
    optimizer.observations.clear()
    return health.check(
        progress, snapshot(optimizer), held_layers=optimizer.held_layers, revivals=came_back
    )


def _warnings(schedule: Schedule | None = None, steps: int = _STEPS, **options: Any) -> list[str]:
    """All warnings of a whole run, as a training loop would ask for them."""
    model = mlp()
    defaults = {"lr": 0.05, "lam": 0.05, "mask_lr": 0.003}
    optimizer = SCL(connection_groups(model), **{"normalize": "feature", **defaults, **options})
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


def _snapshot_of(live: int) -> Snapshot:
    return Snapshot({"a": live}, {"a": 150}, 0.0, (0.5, 0.5, 0.5), 1.0, (0,) * 40)


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
        mask_restart=0.0,
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
    came_back = 0

    def after(index: int) -> None:
        nonlocal before, came_back
        now = optimizer.masks()
        came_back += sum(int((now[n] & ~before[n]).sum()) for n in now)
        before = now
        found.extend(_check(health, (index + 1) / _STEPS, optimizer))

    train(model, optimizer, mlp_batches(_STEPS), after)
    dead = sum(int((~m).sum()) for m in before.values())
    assert dead > 800 and came_back < dead / 10, "a wave of deaths"
    assert "flicker" not in _names(found)


def test_hovering() -> None:
    """A learned mask phase whose last tenth, in two checks, changes so many of 100 connections."""

    def found(came: float, *, freeze_at: float = 0.5) -> list[str]:
        health, shot = MaskHealth(freeze_at), _snapshot_of(live=100)
        came_of_each = hovering(came, shot.live)
        parts = [p * freeze_at for p in (0.8, 0.9, 1.0)]
        return [text for p in parts for text in health.check(p, shot, hovering=came_of_each)]

    assert found(20) == []
    [warning] = found(44)
    assert _names([warning]) == ["hovering"]
    # 44 in a tenth of the phase are 22 in a twentieth.
    assert "in 5% of the time to learn them 22% of the live connections" in warning
    assert found(44, freeze_at=0.0) == []


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
    settings: dict[str, Any] = {"normalize": "feature", "mask_momentum": 0.0}
    optimizer = SCL(connection_groups(layer), lr=0.0, lam=0.0, mask_lr=0.8, **settings)
    optimizer.observing = True
    # rms per feature 1, 4 and 0; after normalisation 1, 1 and 0. m: 1 − 0.8 stays, 1 + 0.8 too.
    layer.weight.grad = torch.tensor([[1.0, -1.0], [4.0, 4.0], [0.0, 0.0]])
    optimizer.step()
    metrics = observation_metrics(optimizer.observations)
    assert optimizer.observations["weight"].flips == 0
    assert metrics["masks/dead_features"] == 1
    assert metrics["imbalance/weight"] == pytest.approx(4)
    # Of the two features that live (1 and 4) torch takes the lower median, 1.
    assert metrics["masks/imbalance_before"] == pytest.approx(4)
    assert metrics["masks/imbalance_after"] == pytest.approx(1)
    optimizer.step()
    # Now the three with gradient above 0 go from 0.2 to −0.6.
    assert optimizer.observations["weight"].flips == 3
    assert observation_metrics({}) == {} and revivals({}) is None


def test_normalisation_removes_the_imbalance_of_a_real_network() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight[:, 3] *= 30  # so feature 3 of the first layer is loud
    optimizer = SCL(connection_groups(model), lr=0.01, lam=0.1, normalize="feature")
    optimizer.observing = True
    train(model, optimizer, mlp_batches(3))
    metrics = observation_metrics(optimizer.observations)
    assert metrics["masks/imbalance_before"] > 3
    assert metrics["masks/imbalance_after"] == pytest.approx(1, abs=1e-3)
    assert all(math.isfinite(v) for v in metrics.values())


# --- what masks do between two lines ----------------------------------------------------------


def _brute_force_flips(optimizer: SCL, before: dict[str, torch.Tensor]) -> tuple[int, int]:
    now = optimizer.masks()
    changed = {name: now[name] != before[name] for name in now}
    flips = sum(int(c.sum()) for c in changed.values())
    return flips, sum(int((c & now[name]).sum()) for name, c in changed.items())


@pytest.mark.parametrize("fused", ["0", "1"])
def test_flips_are_counted_over_all_updates(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCL_FUSED", fused)
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.05, mask_lr=0.5, mask_momentum=0.0)
    counter, expected, lines = FlipCounter(optimizer), [0, 0], []
    before = optimizer.masks()

    def after(index: int) -> None:
        nonlocal before
        flips, back = _brute_force_flips(optimizer, before)
        expected[0], expected[1] = expected[0] + flips, expected[1] + back
        before = optimizer.masks()
        if index % 10 == 9:
            assert counter.take() == {"masks/flips": expected[0], "masks/revivals": expected[1]}
            lines.append(tuple(expected))
            expected[:] = [0, 0]

    train(model, optimizer, mlp_batches(40), after)
    assert len(lines) == 4 and all(flips > back > 0 for flips, back in lines)
    # More than what differs between the lines: masks went and came back within an interval.
    assert sum(flips for flips, _ in lines) > 192


def test_a_layer_without_a_gradient_does_not_flip_again() -> None:
    """What an earlier step counted of it must not be counted once more."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    # All die at once: of each layer the best one is kept.
    optimizer = SCL(connection_groups(model), lr=0.0, lam=3.0, mask_lr=1.0, mask_momentum=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {name: flips for name, (flips, _) in optimizer.take_flips().items()} == {
        "0.weight": 16,
        "1.weight": 16,
    }
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    assert optimizer.take_flips()["0.weight"] == (0, 0)
    assert optimizer.take_flips()["1.weight"] == (0, 0), "taken"


def test_counting_goes_on_from_a_saved_state() -> None:
    counters = []
    for interrupted in (False, True):
        model = mlp()
        optimizer = SCL(connection_groups(model), lr=0.05, lam=0.05, mask_lr=0.5)
        counter = FlipCounter(optimizer)
        batches = list(mlp_batches(20))
        train(model, optimizer, batches[:7])
        if interrupted:
            kept = {names: counts.clone() for names, counts in counter.state().items()}
            again = SCL(connection_groups(model), lr=0.05, lam=0.05, mask_lr=0.5)
            again.load_state_dict(optimizer.state_dict())
            optimizer, counter = again, FlipCounter(again)
            counter.restore(kept)
        train(model, optimizer, batches[7:])
        counters.append(counter.take())
    assert counters[0] == counters[1] and counters[0]["masks/flips"] > 0


def test_flips_of_a_method_without_mask_variables_are_against_the_line_before() -> None:
    model = mlp()
    optimizer = Driver(Magnitude(density=0.25), connection_groups(model), lr=0.05)
    counter = FlipCounter(optimizer)
    train(model, optimizer, mlp_batches(2))
    assert counter.take()["masks/flips"] == 192 - sum(optimizer.live_connections().values())
    kept = dict(counter.state())
    again = FlipCounter(optimizer)
    again.restore(kept)
    for counted in (counter, again):
        assert counted.take() == {"masks/flips": 0, "masks/revivals": 0}
    anew = FlipCounter(optimizer)
    anew.restore(None)
    assert anew.take()["masks/flips"] == 0


def test_the_histogram_has_the_dead_on_its_left() -> None:
    values = [-3.0, -1.0, -0.96, -0.01, 0.0, 0.01, 0.05, 0.051, 1.0, 7.0]
    shot = snapshot(_with_masks(values))
    assert len(shot.histogram) == len(HISTOGRAM_EDGES) - 1 == 40
    dead = sum(shot.histogram[:20])
    assert dead == 5 and sum(shot.histogram[20:]) == shot.live["weight"] == 5
    # Beyond the edges, in the outer bins; a bin holds its right edge.
    assert shot.histogram[0] == 3 and shot.histogram[-1] == 2
    assert shot.histogram[19:22] == (2, 2, 1)


def test_a_snapshot_without_a_recount_is_that_of_the_last_step() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.3, mask_lr=0.02)
    seen = []
    train(
        model,
        optimizer,
        mlp_batches(60),
        lambda i: seen.append((snapshot(optimizer), snapshot(optimizer, recount=False))),
    )
    assert all(recounted == counted for recounted, counted in seen)
    assert seen[-1][0].density < 0.5


def test_connections_and_macs_are_those_of_the_budgets() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    groups = connection_groups(model, exclude=["2"])
    optimizer = SCL(groups, lr=0.05, lam=0.5, mask_lr=0.1)
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    uses = weight_uses(model, torch.empty(1, 1, 8, 8))
    found = connection_metrics(layer_budgets(model, uses), optimizer.live_connections())
    budgets = layer_budgets(model, uses, optimizer.masks())
    assert 0 < budgets[0].live < 36
    assert found["connections/live"] == sum(b.live for b in budgets)
    assert found["connections/density"] == sum(b.live for b in budgets) / (36 + 720)
    assert found["connections/macs"] == sum(b.macs for b in budgets)
    assert found["connections/macs_share"] == sum(b.macs for b in budgets) / (36 * 36 + 720)
    assert found["density/0.weight"] == budgets[0].density
    assert found["macs/0.weight"] == budgets[0].macs
    # Opted out: it counts for the network, and has no course of its own.
    assert "density/2.weight" not in found
    dense = connection_metrics(layer_budgets(model, uses), {})
    assert dense["connections/density"] == dense["connections/macs_share"] == 1
