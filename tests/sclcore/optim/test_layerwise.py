"""Learning rates by layer: torch's own arithmetic with one group a rate, and masks as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sclcore import SCL, connection_groups
from sclcore.driver.build import optimizer_of
from sclcore.optim.layerwise import share_learning_rates
from sclcore.registry import parse_method
from tests.sclcore.nets import Mixed, mixed_batches

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.05}
MASKS: dict[str, Any] = {"lam": 0.05, "mask_lr": 0.02, "mask_momentum": 0.8}


@pytest.fixture(params=["fused", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setenv("SCL_FUSED", "0")


def shares_of(model: nn.Module) -> dict[str, float]:
    """The first layer a quarter, the next half, the others all of the learning rate."""
    layers = [*dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())]
    known = dict(zip(layers, (0.25, 0.5), strict=False))
    return {name: known.get(name.rpartition(".")[0], 1.0) for name, _ in model.named_parameters()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    batches = mixed_batches(torch.float32)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("method", ["scl", "dense", "magnitude"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_it_is_torchs_optimizer_with_a_group_for_each_rate(rule: str, method: str) -> None:
    ours, theirs = Mixed(), Mixed()
    theirs.load_state_dict(ours.state_dict())
    settings = SGD if rule == "sgd" else ADAMW
    weights = {**settings, "weight_rule": rule}
    shares = shares_of(ours)
    assert {*shares.values()} == {0.25, 0.5, 1.0}
    if method == "scl":
        optimizer: torch.optim.Optimizer = SCL(
            connection_groups(ours), lam=0.0, mask_lr=0.0, **weights
        )
    else:
        # Pruned after the last of these updates, which progress does not come to.
        known = {"name": method} | ({"density": 0.5} if method == "magnitude" else {})
        optimizer = optimizer_of(parse_method(known), ours, torch.empty(0), weights)
    share_learning_rates(optimizer, ours, shares)
    groups = [
        {
            "params": [p],
            "lr": shares[name] * settings["lr"],
            **({"weight_decay": 0.0} if p.ndim <= 1 else {}),
        }
        for name, p in theirs.named_parameters()
    ]
    if rule == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(groups, **SGD)
    else:
        reference = torch.optim.AdamW(groups, **ADAMW, fused=True)
    train(ours, optimizer, 30)
    train(theirs, reference, 30)
    for (name, mine), value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, value), name


@pytest.mark.usefixtures("kernels")
def test_masks_move_as_without_it() -> None:
    """In the first update, of which the gradients are the same."""
    models = [Mixed() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [SCL(connection_groups(model), **SGD, **MASKS) for model in models]
    share_learning_rates(optimizers[1], models[1], shares_of(models[1]))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
    one, other = (optimizer.mask_variables() for optimizer in optimizers)
    assert one.keys() == other.keys() and one
    for name, mask in one.items():
        assert torch.equal(mask, other[name]), name
    moved = list(models[0].parameters())
    assert any(not torch.equal(p, q) for p, q in zip(moved, models[1].parameters(), strict=True))


def test_fused_and_plain_steps_choose_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for fused in ("1", "0"):
        monkeypatch.setenv("SCL_FUSED", fused)
        torch.manual_seed(0)
        model = Mixed()
        optimizer = SCL(connection_groups(model), **SGD, **MASKS)
        share_learning_rates(optimizer, model, shares_of(model))
        train(model, optimizer, 40)
        assert 0 < sum(optimizer.live_connections().values()) < 282
        hashes.append(optimizer.mask_hash())
    assert hashes[0] == hashes[1]
