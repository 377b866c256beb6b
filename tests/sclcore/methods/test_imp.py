"""Iterative magnitude pruning against a plain loop over trainings, and what it says of itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import Schedule, Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.imp import IMP
from tests.sclcore.methods.resumed import assert_goes_on_bit_for_bit
from tests.sclcore.nets import Mlp, mixed_batches, mlp, mlp_batches, mse_step

SCHEDULE = Schedule(lr_warmup=0.2)
WEIGHTS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}


def driver(model: nn.Module, **options: Any) -> Driver:
    rule = {"weight_rule": options.pop("rule", "sgd")}
    weights = WEIGHTS if rule["weight_rule"] == "sgd" else {"weight_decay": 1e-2}
    method = IMP.model_validate({"iterations": 2, "prune_fraction": 0.4} | options)
    return Driver(method, connection_groups(model), lr=0.1, **weights, **rule)


def train(
    model: nn.Module,
    optimizer: Driver,
    batches: list[tuple[Tensor, Tensor]],
    steps: range | None = None,
    *,
    prepared: bool = True,
) -> None:
    """The updates of a run of as many as there are batches; `prepared`: as the launcher does."""
    scheduler = Scheduler(optimizer, SCHEDULE)
    for step in steps or range(len(batches)):
        scheduler.set_progress(step / len(batches))
        if prepared:
            optimizer.before_update()
        mse_step(model, optimizer, batches[step])


class Loop:
    """One `torch.optim.SGD` after another; the smallest weights of the network go in between."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model = model
        self.masks = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.ndim > 1}
        self.kept: dict[str, Tensor] = {}
        self._batches = iter(batches)

    def train(self, first: int, end: int, keep_at: int | None = None) -> None:
        """A fresh optimizer, from update `first` of a schedule of `end`."""
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for step in range(first, end):
            if step == keep_at:
                self.kept = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * SCHEDULE.lr_factor(step / end)
            optimizer.zero_grad()
            inputs, targets = next(self._batches)
            nn.functional.mse_loss(self.model(inputs), targets).backward()
            for name, p in self.model.named_parameters():
                if name in self.masks and p.grad is not None:
                    p.grad *= self.masks[name]
            optimizer.step()

    @torch.no_grad()
    def prune(self, share: float) -> None:
        parameters = dict(self.model.named_parameters())
        live = sorted(
            abs(float(w))
            for name, mask in self.masks.items()
            for w, on in zip(parameters[name].flatten(), mask.flatten(), strict=True)
            if on
        )
        bound = live[math.floor(share * len(live))]
        for name, mask in self.masks.items():
            mask *= parameters[name].abs() >= bound
            parameters[name].mul_(mask)

    @torch.no_grad()
    def put_back(self) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(self.kept[name])
            if name in self.masks:
                p *= self.masks[name]


def assert_same(model: nn.Module, loop: Loop) -> None:
    """To rounding in double, with the same connections."""
    others = dict(loop.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p, others[name], rtol=0, atol=1e-12), name
        assert torch.equal(p != 0, others[name] != 0), name


def made(updates: int) -> tuple[Mlp, Loop, list[tuple[Tensor, Tensor]]]:
    model, batches = mlp(dtype=torch.float64), mlp_batches(updates, dtype=torch.float64)
    return model, Loop(copy.deepcopy(model), batches), batches


def test_lr_rewinding_is_one_training_after_the_other() -> None:
    """At `shorter` ½, of 48 updates: 12, 12 and 24."""
    model, loop, batches = made(48)
    optimizer = driver(model, shorter=0.5)
    train(model, optimizer, batches)
    for updates in (12, 12):
        loop.train(0, updates)
        loop.prune(0.4)
    loop.train(0, 24)
    assert_same(model, loop)
    # ⌊0.4 · 192⌋ and ⌊0.4 · 116⌋ have gone.
    assert sum(optimizer.live_connections().values()) == 192 - 76 - 46
    assert optimizer.metrics() == {"imp/iteration": 2.0}


@pytest.mark.parametrize(("rewind_to", "early", "updates"), [(0.0, 0, 48), (0.25, 4, 40)])
def test_weight_rewinding_returns_to_the_weights_of_that_update(
    rewind_to: float, early: int, updates: int
) -> None:
    """Three times 16 updates; or 16, and twice the last 12 of 16."""
    model, loop, batches = made(updates)
    optimizer = driver(model, shorter=1.0, rewind="weights", rewind_to=rewind_to)
    train(model, optimizer, batches)
    loop.train(0, 16, keep_at=early)
    for _ in range(2):
        loop.prune(0.4)
        loop.put_back()
        loop.train(early, 16)
    assert_same(model, loop)
    # What nothing returns to any more is no longer saved.
    assert not any("rewind" in state for state in optimizer.state.values())


@pytest.mark.parametrize("rewind", ["lr", "weights"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 6, 12, 13, 30])
def test_what_is_saved_goes_on_bit_for_bit(rewind: str, rule: str, cut: int) -> None:
    """At any update, that before a pruning (after 12 of 48) and that after it too."""
    options: dict[str, Any] = {"rewind": rewind, "rule": rule}
    options |= {"rewind_to": 0.2} if rewind == "weights" else {}
    batches = mixed_batches(torch.float32, 48)
    assert_goes_on_bit_for_bit(lambda m: driver(m, **options), train, batches, cut)


def test_a_loop_that_only_steps_prunes_as_well() -> None:
    """One update later: its first gradient is that of the network before the pruning."""
    model = mlp()
    optimizer = driver(model)
    train(model, optimizer, mlp_batches(48), prepared=False)
    live = {name: int(p.count_nonzero()) for name, p in model.named_parameters() if p.ndim > 1}
    assert optimizer.live_connections() == live and sum(live.values()) == 70


def test_a_layer_keeps_its_best_weight_and_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight.mul_(1e-3)
    optimizer = driver(model, iterations=1, prune_fraction=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    Scheduler(optimizer, SCHEDULE).set_progress(0.5)
    optimizer.before_update()
    mse_step(model, optimizer, mlp_batches(1)[0])
    assert optimizer.held_layers == ["2.weight"]
    assert optimizer.live_connections()["2.weight"] == 1


def test_an_update_that_comes_to_nothing_does_not_prune_twice() -> None:
    model, batches = mlp(), mlp_batches(48)
    optimizer = driver(model)
    train(model, optimizer, batches, range(12))
    inputs, targets = batches[12]
    train(model, optimizer, [*batches[:12], (inputs * math.inf, targets), *batches[13:]])
    assert optimizer.skipped_steps == 1
    assert sum(optimizer.live_connections().values()) == 70


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 0}, "iterations\n.*greater than or equal to 1"),
        ({"prune_fraction": 1.0}, "prune_fraction\n.*less than 1"),
        ({"shorter": 0.0}, "shorter\n.*greater than 0"),
        ({"rewind_to": 0.1}, "rewind_to would do nothing with rewind: lr"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        driver(mlp(), **options)


def test_trainings_of_a_few_updates_are_warned_of() -> None:
    method = IMP(iterations=9, shorter=0.5)
    assert method.foreseen(SCHEDULE, 1100) == []
    [warning] = method.foreseen(SCHEDULE, 55)
    assert "a training between two prunings is 5 of this run's 55 updates" in warning
