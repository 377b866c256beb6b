"""OptG against a plain loop over its two rules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.optg import OptG
from tests.sclcore.methods.resumed import assert_goes_on_bit_for_bit
from tests.sclcore.methods.scheduled import SCHEDULE, train
from tests.sclcore.nets import Mixed, mixed_batches, mlp, mlp_batches

STEPS = 40
NAMES = ("0.weight", "2.weight")


def driver(model: nn.Module, rule: str = "sgd", nesterov: bool = False, **options: Any) -> Driver:
    weights = {"momentum": 0.9, "nesterov": nesterov} if rule == "sgd" else {}
    method = OptG.model_validate({"density": 0.2, "steepness": 25, "every": 3} | options)
    groups = connection_groups(model)
    return Driver(method, groups, lr=0.05, weight_decay=1e-2, weight_rule=rule, **weights)


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_is_autograd_of_a_hard_gate(nesterov: bool) -> None:
    """v = w ⊙ (mask + m − m.detach()), two groups of torch's SGD, and a sorted list of scores."""
    model, batches = mlp(dtype=torch.float64), mlp_batches(STEPS, dtype=torch.float64)
    book = copy.deepcopy(model)
    optimizer = driver(model, nesterov=nesterov)
    weights = {n: p for n, p in book.named_parameters() if n in NAMES}
    scores = {n: nn.Parameter(torch.zeros_like(p)) for n, p in weights.items()}
    masks = {n: torch.ones_like(p) for n, p in weights.items()}
    others = {n: p for n, p in book.named_parameters() if n not in NAMES}
    groups = [
        {"params": [*weights.values()], "weight_decay": 1e-2},
        {"params": [*others.values()]},
        {"params": [*scores.values()]},
    ]
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=nesterov)
    scheduler = Scheduler(sgd, SCHEDULE)
    revived = 0
    for step in range(STEPS):
        share = 1 / (1 + math.exp(-25 * (step / STEPS - 0.5)))
        scheduler.set_progress(step / STEPS)
        sgd.param_groups[2]["lr"] *= share
        gated = {n: w * (masks[n] + scores[n] - scores[n].detach()) for n, w in weights.items()}
        sgd.zero_grad()
        outputs = torch.func.functional_call(book, gated | others, batches[step][0])
        nn.functional.mse_loss(outputs, batches[step][1]).backward()
        sgd.step()
        if step % 3 == 0:
            live = round((1 - 0.8 * (1.0 if share > 0.999 else share)) * 192)
            ranked = sorted((-float(x), i) for i, x in enumerate(_flat(scores)))[:live]
            chosen = torch.zeros(192, dtype=torch.float64)
            chosen[[i for _, i in ranked]] = 1.0
            new = dict(zip(NAMES, chosen.split([128, 64]), strict=True))
            revived += int((chosen.bool() & ~_flat(masks).bool()).sum())
            masks = {n: new[n].view_as(masks[n]) for n in NAMES}
    assert revived > 2

    train(model, optimizer, batches)
    for name, p in model.named_parameters():
        expected = weights[name] * masks[name] if name in NAMES else others[name]
        # To rounding in double.
        assert torch.allclose(p, expected, rtol=0, atol=1e-12), name
    assert sum(optimizer.live_connections().values()) == round(0.2 * 192)


def _flat(tensors: dict[str, Any]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in NAMES])


@pytest.mark.parametrize("density", [0.03, 0.111, 1.0])
def test_the_density_is_reached_exactly(density: float) -> None:
    model = Mixed()
    optimizer = driver(model, density=density)
    train(model, optimizer, mixed_batches(torch.float32, STEPS))
    total = sum(optimizer.connection_sizes().values())
    # Every layer keeps one, of which Mixed has five.
    assert sum(optimizer.live_connections().values()) == max(5, round(density * total))


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_what_is_saved_goes_on_bit_for_bit(rule: str) -> None:
    batches = mixed_batches(torch.float32, STEPS)
    assert_goes_on_bit_for_bit(lambda model: driver(model, rule), train, batches, 23)


def test_a_dead_weight_decays_and_comes_back_as_it_is() -> None:
    model, batches = mlp(), mlp_batches(STEPS)
    optimizer = driver(model)
    train(model, optimizer, batches)
    state = optimizer.state[model.first.weight]
    dead = ~state["mask"]
    assert (state["weight"][dead] != 0).all() and not model.first.weight[dead].any()
    place = tuple(dead.nonzero()[0].tolist())
    with torch.no_grad():
        model.first.weight[place] = 3.0
    with pytest.warns(UserWarning, match=r"1 of them"):
        optimizer.read_weights()
    assert model.first.weight[place] == 0 and state["weight"][place] != 3.0
