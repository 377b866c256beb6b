"""Neural plasticity networks: three stages, pruning and growing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import Schedule
from sclcore.driver.bernoulli import regulariser
from sclcore.driver.build import optimizer_of
from sclcore.driver.gates import gated_layers
from sclcore.driver.optimizer import Driver
from sclcore.methods.npn import NPN
from tests.sclcore.driver.gated_net import GATES, gated_batches, gated_net
from tests.sclcore.methods.gated_training import gated_training

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
EXAMPLE = torch.zeros(1, 2, 4, 4)


def npn(model: nn.Module, seed: int = 0, **options: Any) -> Driver:
    options = {"lam": 1.0, "gate_lr": 0.02} | options
    optimizer = optimizer_of(NPN(**options), model, EXAMPLE, SGD, seed)
    assert isinstance(optimizer, Driver)
    return optimizer


def phis(optimizer: Driver) -> dict[str, Tensor]:
    return {layer.name: layer.state["phi"].clone() for layer in gated_layers(optimizer)}


def test_gates_learn_in_the_second_stage_alone_and_only_there_cost_a_pass() -> None:
    model, batches = gated_net(dtype=torch.float32), gated_batches(40, torch.float32)
    optimizer = npn(model, learn_from=0.25, learn_until=0.75)
    seen, passes = [], []

    def look(step: int) -> None:
        seen.append(torch.cat([*phis(optimizer).values()]))
        passes.append(optimizer.passes)

    gated_training(model, optimizer, batches, each=look)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [9 <= step < 29 for step in range(39)]
    assert passes == [1] * 10 + [2] * 20 + [1] * 10


def test_the_first_stage_is_ordinary_training() -> None:
    """At k = 5000 every gate is 1, and so is every factor: bit for bit torch's SGD."""
    model, other = gated_net(dtype=torch.float32), gated_net(dtype=torch.float32)
    batches = gated_batches(10, torch.float32)
    optimizer = npn(model, learn_from=0.9, learn_until=1.0)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1]},
        {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, **SGD)
    gated_training(model, optimizer, batches, range(9))
    for images, labels in batches[:9]:
        sgd.zero_grad()
        nn.functional.cross_entropy(other(images), labels).backward()
        sgd.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_price_prunes_and_what_is_left_is_whole() -> None:
    model, batches = gated_net(dtype=torch.float32), gated_batches(80, torch.float32)
    optimizer = npn(model, lam=20.0, learn_from=0.1, learn_until=0.7, gate_lr=0.04)
    gated_training(model, optimizer, batches)
    live, sizes = optimizer.live_connections(), optimizer.connection_sizes()
    assert 0 < sum(live.values()) < 0.8 * sum(sizes.values())
    # π is 0 or 1 in the end, but for a φ that ended within 0.001 of 0: here there is none.
    gates = torch.cat([*optimizer.method.shown(optimizer).values()])  # type: ignore[attr-defined]
    assert set(gates.tolist()) == {0.0, 1.0}
    assert optimizer.method.masks_are_final(Schedule(), 56, 80)
    assert not optimizer.method.masks_are_final(Schedule(), 55, 80)


def test_it_grows_by_a_feature_when_it_was_never_better() -> None:
    model, batches = gated_net(dtype=torch.float32), gated_batches(100, torch.float32)
    optimizer = npn(model, lam=0.0, grow=True, init_size=0.5, learn_from=0.2, learn_until=0.9)

    def sizes() -> list[int]:
        return [layer.state["size"] for layer in gated_layers(optimizer)]

    gated_training(model, optimizer, batches, range(10))
    assert sizes() == [2, 2, 2]
    assert optimizer.live_connections()["conv.weight"] == 2 * 18
    optimizer.after_epoch({"val/loss": 1.0})
    assert sizes() == [2, 2, 2], "not in the first stage"
    gated_training(model, optimizer, batches, range(10, 25))
    penalty = regulariser(optimizer, optimizer.method._pi(optimizer), 0.0)  # type: ignore[attr-defined]
    assert penalty > 0
    optimizer.after_epoch({"val/loss": 1.0})
    assert sizes() == [3, 3, 3]
    assert phis(optimizer)["conv.weight"][2] == 0.0
    assert optimizer.live_connections()["conv.weight"] == 3 * 18, "π = ½ is evaluated"
    optimizer.after_epoch({"val/loss": 1.0})
    assert sizes() == [3, 3, 3], "no better"
    # A layer that uses less than it has gets no more; one that is full neither.
    for layer in gated_layers(optimizer):
        if layer.name == "deep.weight":
            layer.state["phi"][0] = -1.0
    for loss in (0.9, 0.8, 0.7):
        optimizer.after_epoch({"val/loss": loss})
    assert sizes() == [4, 3, 5]
    gated_training(model, optimizer, batches, range(25, 100))
    assert optimizer.live_connections()["hidden.weight"] <= 5 * 16


def test_what_is_saved_goes_on_bit_for_bit_also_from_the_end_of_an_epoch() -> None:
    """There an evaluation comes first, when progress is not known yet."""
    batches = gated_batches(30, torch.float32)
    whole, first, other = (gated_net(seed, torch.float32) for seed in (0, 0, 1))
    options: dict[str, Any] = {"grow": True, "init_size": 0.5, "lam": 0.1}
    optimizer, interrupted, resumed = (npn(m, **options) for m in (whole, first, other))
    gated_training(whole, optimizer, batches, range(13))
    optimizer.after_epoch({"val/loss": 1.0})
    gated_training(whole, optimizer, batches, range(13, 30))

    gated_training(first, interrupted, batches, range(13))
    other.load_state_dict(first.state_dict())
    saved = copy.deepcopy(interrupted.state_dict())
    for group in saved["param_groups"]:
        group["progress"] = 0.0
    resumed.load_state_dict(saved)
    for (name, p), q in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    resumed.after_epoch({"val/loss": 1.0})
    gated_training(other, resumed, batches, range(13, 30))
    for (name, p), q in zip(whole.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {name: len(phi) for name, phi in phis(resumed).items()} == dict.fromkeys(GATES, 4) | {
        "hidden.weight": 5
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grow": True}, "grow needs room, and with init_size 1 every layer begins with all"),
        ({"grow": True, "init_size": 0.95}, "init_size 0.95 every layer"),
        ({"learn_from": 0.8}, "learn_from must lie below learn_until, which is 0.8"),
        ({"lam": {"conv": 1.0}}, "lam has no value for the layer deep"),
        ({"init_size": 0.0}, "init_size\n.*greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npn(gated_net(), **options)


def test_only_the_second_stage_costs_more() -> None:
    assert NPN(lam=1.0, learn_from=0.2, learn_until=0.8).update_cost == pytest.approx(1.2)
