"""Projected gradient and double descent against plain loops of torch's SGD and of numpy sorts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sclcore import Schedule, Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.driver.projections import BALLS
from sclcore.methods.projection import Projection
from tests.sclcore.methods.resumed import assert_goes_on_bit_for_bit
from tests.sclcore.nets import Mixed, mixed_batches, mlp, mlp_batches, mse_step

SCHEDULE = Schedule(lr_warmup=0.2)
WEIGHTS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}
TOTAL, EPOCH = 40, 8
Batches = list[tuple[Tensor, Tensor]]


def driver(model: nn.Module, **options: Any) -> Driver:
    rule = {"weight_rule": options.pop("rule", "sgd")}
    weights = WEIGHTS if rule["weight_rule"] == "sgd" else {"weight_decay": 1e-2}
    method = Projection.model_validate({"radius": 0.3, "every": "update"} | options)
    return Driver(method, connection_groups(model), lr=0.05, **weights, **rule)


def updates(
    model: nn.Module, optimizer: Driver, batches: Batches, steps: range = range(TOTAL)
) -> Iterator[int]:
    """Of a run of 40 updates, 5 epochs, as the launcher makes them; tells of each made."""
    scheduler = Scheduler(optimizer, SCHEDULE)
    for step in steps:
        scheduler.set_progress(step / TOTAL)
        optimizer.before_update()
        mse_step(model, optimizer, batches[step])
        yield step
        if (step + 1) % EPOCH == 0:
            optimizer.after_epoch({"val/loss": 1.0})


def train(
    model: nn.Module, optimizer: Driver, batches: Batches, steps: range = range(TOTAL)
) -> None:
    for _ in updates(model, optimizer, batches, steps):
        pass


def on_l1(weight: Tensor, radius: float) -> Tensor:
    """With numpy, by the smallest of the thresholds at which the sum fits."""
    w = weight.detach().numpy()
    sizes = np.sort(np.abs(w).ravel())[::-1]
    if sizes.sum() <= radius:
        return weight.detach().clone()
    tau = max((sizes[: k + 1].sum() - radius) / (k + 1) for k in range(len(sizes)))
    return torch.from_numpy(np.sign(w) * np.maximum(np.abs(w) - tau, 0))


class Loop:
    """`torch.optim.SGD` over the whole network, with masks where there are some."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model = model
        self.layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
        self.norms: dict[str, float] = {}
        self.initial = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.masks: dict[str, Tensor] = {}
        self._batches = iter(batches)
        self.begin()

    def begin(self) -> None:
        others = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": [*self.layers.values()], "weight_decay": 1e-2}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def update(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 * SCHEDULE.lr_factor(progress)
        self.optimizer.zero_grad()
        inputs, targets = next(self._batches)
        nn.functional.mse_loss(self.model(inputs), targets).backward()
        for name, mask in self.masks.items():
            grad = self.layers[name].grad
            assert grad is not None
            grad *= mask
        self.optimizer.step()

    @torch.no_grad()
    def project(self, share: float) -> None:
        """Onto a share of the norms at the first projection."""
        for name, p in self.layers.items():
            norm = self.norms.setdefault(name, float(p.abs().sum()))
            p.copy_(on_l1(p, share * norm))

    @torch.no_grad()
    def fix(self, *, momentum: bool) -> None:
        for name, p in self.layers.items():
            self.masks[name] = (p != 0).double()
            if momentum:
                self.optimizer.state[p]["momentum_buffer"] *= self.masks[name]


def assert_same(model: nn.Module, loop: Loop) -> None:
    """To rounding in double, with the same connections."""
    others = dict(loop.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p, others[name], rtol=0, atol=1e-12), name
        assert torch.equal(p != 0, others[name] != 0), name


def made() -> tuple[nn.Module, Loop, Batches]:
    model, batches = mlp(dtype=torch.float64), mlp_batches(TOTAL, dtype=torch.float64)
    return model, Loop(copy.deepcopy(model), batches), batches


@pytest.mark.parametrize("every", ["update", 3, "epoch"])
def test_projected_gradient_is_a_step_and_a_projection(every: Any) -> None:
    """From the 5th update to the 24th, the first at a progress of 0.575 or more."""
    model, loop, batches = made()
    optimizer = driver(model, every=every, begin=0.1, end=0.575)
    for step in updates(model, optimizer, batches):
        loop.update(step / TOTAL)
        due = {"update": True, 3: step % 3 == 0, "epoch": step % EPOCH == 0}[every]
        if (4 <= step < 23 and due) or step == 23:
            loop.project(0.3)
        if step == 23:
            loop.fix(momentum=True)
        if every == "update" and step >= 4:
            assert_same(model, loop)
    assert_same(model, loop)
    live = optimizer.live_connections()
    assert 0 < sum(live.values()) < 0.8 * 192
    assert live == {n: int(p.count_nonzero()) for n, p in loop.layers.items()}


@pytest.mark.parametrize("restart", ["projected", "initial"])
def test_double_descent_is_two_trainings_with_a_projection_between(restart: Any) -> None:
    """Of 16 and of 24 updates, each with the whole schedule and a fresh optimizer."""
    model, loop, batches = made()
    optimizer = driver(model, every="once", end=0.4, restart=restart)
    train(model, optimizer, batches)
    for step in range(16):
        loop.update(step / 16)
    loop.project(0.3)
    loop.fix(momentum=False)
    with torch.no_grad():
        for name, p in loop.model.named_parameters():
            if restart == "initial":
                p.copy_(loop.initial[name] * loop.masks.get(name, torch.ones(())))
    loop.begin()
    for step in range(24):
        loop.update(step / 24)
    assert_same(model, loop)
    assert 0 < sum(optimizer.live_connections().values()) < 0.6 * 192
    assert not any("initial" in state for state in optimizer.state.values())


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("over", ["columns", "rows"])
def test_every_layer_is_on_its_ball_after_the_last_projection(ball: Any, over: Any) -> None:
    """Convolutions and attention too; of what is grouped, whole groups are 0 and none in part."""
    model = Mixed()
    optimizer = driver(model, ball=ball, over=over, every="once", end=0.5, radius=0.4)
    train(model, optimizer, mixed_batches(torch.float32, TOTAL), range(20))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Scheduler(optimizer, SCHEDULE).set_progress(0.5)
    optimizer.before_update()
    for name, mask in optimizer.masks().items():
        w = model.get_parameter(name).detach()
        first = (name == "up.weight") == (over == "columns")
        rows, old = ((x if first else x.transpose(0, 1)).flatten(1) for x in (w, before[name]))
        norm = BALLS[ball].norm
        assert norm(rows) == pytest.approx(0.4 * norm(old), rel=1e-6), name
        assert torch.equal(mask, w != 0)
        dead = (rows == 0).all(1)
        if ball == "l21":
            assert int(dead.sum()) * rows.shape[1] == int((~mask).sum())
        if ball == "l1inf":
            heights = torch.where(dead, 0.0, rows.abs().amax(1))
            lower = rows.abs() < old.abs() * (1 - 1e-6)
            assert torch.allclose(rows.abs()[lower], heights[:, None].expand_as(rows)[lower])


@pytest.mark.parametrize("every", ["update", "epoch", "once"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 8, 19, 20, 21, 30])
def test_what_is_saved_goes_on_bit_for_bit(every: Any, rule: str, cut: int) -> None:
    """At any update, those around the last projection, the 21st, among them."""
    options: dict[str, Any] = {"every": every, "rule": rule}
    options |= {"restart": "initial"} if every == "once" else {}
    batches = mixed_batches(torch.float32, TOTAL)
    optimizer = assert_goes_on_bit_for_bit(lambda m: driver(m, **options), train, batches, cut)
    live = sum(optimizer.live_connections().values())
    assert 0 < live < sum(optimizer.connection_sizes().values())


def test_masks_are_what_is_not_zero_and_stay_after_the_last_projection() -> None:
    model = mlp()
    optimizer = driver(model, every=3, radius=0.2)
    hashes = []
    for _ in updates(model, optimizer, mlp_batches(TOTAL)):
        for name, mask in optimizer.masks().items():
            assert torch.equal(mask, model.get_parameter(name) != 0)
        hashes.append(optimizer.mask_hash())
    assert len(set(hashes[:20])) > 5
    assert hashes[19] != hashes[20] and len(set(hashes[20:])) == 1


def test_values_from_outside_are_projected_with_the_others() -> None:
    model, batches = mlp(), mlp_batches(TOTAL)
    optimizer = driver(model)
    train(model, optimizer, batches, range(10))
    with torch.no_grad():
        model.first.weight[0] = 0.0
        model.first.weight[1] = 5.0
    optimizer.read_weights()
    masks = optimizer.masks()["0.weight"]
    assert not masks[0].any() and masks[1].all()
    train(model, optimizer, batches, range(10, TOTAL))
    dead = ~optimizer.masks()["0.weight"]
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    with pytest.warns(UserWarning, match="belong to dead connections"):
        optimizer.read_weights()
    assert not model.first.weight[dead].any()


def test_an_update_that_comes_to_nothing_leaves_the_connections() -> None:
    model, batches = mlp(), mlp_batches(TOTAL)
    optimizer = driver(model)
    inputs, targets = batches[10]
    bad = [*batches[:10], (inputs * math.inf, targets), *batches[11:]]
    hashes = [optimizer.mask_hash() for _ in updates(model, optimizer, bad)]
    assert optimizer.skipped_steps == 1 and hashes[9] == hashes[10]
    assert hashes[10] != hashes[11]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": 1.0}, "radius\n.*less than 1"),
        ({"ball": "l2"}, "ball\n.*'l1', 'l21', 'l11' or 'l1inf'"),
        ({"every": 0}, "every"),
        ({"begin": 0.6}, "begin must lie below end, which is 0.5"),
        ({"every": "once", "begin": 0.1}, "begin would do nothing with every: once"),
        ({"restart": "initial"}, "restart: initial needs every: once"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        driver(mlp(), **options)
