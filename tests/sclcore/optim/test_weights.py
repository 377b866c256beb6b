"""AdamW for the latent weights: torch's own where no mask moves, and exact through everything."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from tests.sclcore.nets import Mixed, mixed_batches

ADAMW: dict[str, Any] = {
    "lr": 0.01,
    "weight_rule": "adamw",
    "betas": (0.9, 0.95),
    "weight_decay": 0.05,
}
MOVING: dict[str, Any] = {**ADAMW, "lam": 0.05, "mask_lr": 0.02, "mask_momentum": 0.8}


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: Any = torch.float32
) -> None:
    batches = mixed_batches(dtype)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(params=["fused", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setenv("SCL_FUSED", "0")


@pytest.mark.usefixtures("kernels")
def test_without_masks_it_is_torchs_adamw_bit_for_bit() -> None:
    ours, theirs = Mixed(), Mixed()
    theirs.load_state_dict(ours.state_dict())
    scl = SCL(connection_groups(ours), lam=0.0, mask_lr=0.0, **ADAMW)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1]},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    _train(ours, scl, 50)
    _train(theirs, adamw, 50)
    for name, value in _values(theirs).items():
        assert torch.equal(_values(ours)[name], value), name
    assert [group["updates"] for group in scl.param_groups] == [50, 50]


def test_the_fused_mask_step_gives_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divisors may differ in the last bit; 100 steps with lr 0.01 do not make 1e-4 of that."""
    fused = Mixed()
    plain = copy.deepcopy(fused)
    settings = {**MOVING, "normalize": "feature"}
    both = [SCL(connection_groups(model), **settings) for model in (fused, plain)]
    _train(fused, both[0], 100)
    monkeypatch.setenv("SCL_FUSED", "0")
    _train(plain, both[1], 100)
    live = sum(both[0].live_connections().values())
    assert 50 < live < 250, "of 282: the masks have moved"
    assert both[0].mask_hash() == both[1].mask_hash()
    for name, value in _values(plain).items():
        torch.testing.assert_close(_values(fused)[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.usefixtures("kernels")
def test_dead_connections_are_zero_and_their_weights_decay_alone() -> None:
    model = Mixed(attention=False)
    optimizer = SCL(connection_groups(model), **{**MOVING, "lam": 0.2})
    _train(model, optimizer, 60)
    mask = optimizer.masks()["conv.weight"]
    assert 0 < int(mask.sum()) < mask.numel()
    state = optimizer.state[model.conv.weight]
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "mask", "mask_momentum_buffer", "weight"]
    assert torch.equal(model.conv.weight.detach(), state["weight"] * mask)
    for group in optimizer.param_groups:
        group["mask_lr"] = 0.0
    # By then β1^200 of the averages of dead weights is left, and 0.95^100 of their root.
    _train(model, optimizer, 200)
    before = state["weight"].clone()
    _train(model, optimizer, 1)
    dead = before[~mask]
    torch.testing.assert_close(state["weight"][~mask], dead * (1 - 0.01 * 0.05), rtol=0, atol=1e-6)
    assert not torch.allclose(state["weight"][mask], before[mask], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernels")
def test_a_step_that_is_not_finite_counts_nowhere() -> None:
    model = Mixed()
    optimizer = SCL(connection_groups(model), **MOVING)
    _train(model, optimizer, 3)
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    after = (optimizer.state_dict(), model.state_dict())
    assert after[0]["param_groups"] == before[0]["param_groups"]
    for index, state in before[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(after[0]["state"][index][key], value), key
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_saved_and_continued_it_is_the_same_to_the_bit() -> None:
    whole = Mixed()
    parts = copy.deepcopy(whole)
    through = SCL(connection_groups(whole), **MOVING)
    _train(whole, through, 40)
    first = SCL(connection_groups(parts), **MOVING)
    _train(parts, first, 20)
    second = SCL(connection_groups(parts), **MOVING)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["updates"] == 20
    _train(parts, second, 20)
    assert through.mask_hash() == second.mask_hash()
    assert all(torch.equal(_values(whole)[n], value) for n, value in _values(parts).items())


def test_a_copy_of_the_state_without_the_count_would_be_seen() -> None:
    """So the count is needed: the first step after 20 has another bias correction than step 1."""
    model = Mixed()
    optimizer = SCL(connection_groups(model), **MOVING)
    _train(model, optimizer, 20)
    other = copy.deepcopy(model)
    forgetful = SCL(connection_groups(other), **MOVING)
    forgetful.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in forgetful.param_groups:
        group["updates"] = 0
    _train(model, optimizer, 1)
    _train(other, forgetful, 1)
    assert (_values(model)["head.weight"] - _values(other)["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight_rule": "lion"}, "unknown weight_rule 'lion': choose one of sgd, adamw"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers of at least 0 and below 1"),
        ({"betas": (0.9,)}, r"betas must be two numbers"),
        ({"eps": 0.0}, "eps must be above 0 and finite, not 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SCL(connection_groups(nn.Linear(2, 2)), **{**MOVING, **options})


IDLE_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"momentum": 0.9}),
    ("adamw", {"nesterov": True}),
    ("sgd", {"betas": (0.9, 0.999)}),
    ("sgd", {"eps": 1e-8}),
]


@pytest.mark.parametrize(("rule", "options"), IDLE_OPTIONS)
@pytest.mark.parametrize("kind", ["scl", "magnitude"])
def test_options_that_would_do_nothing_are_refused(
    kind: str, rule: str, options: dict[str, Any]
) -> None:
    make: Any = SCL if kind == "scl" else functools.partial(Driver, Magnitude(density=0.5))
    settings = {"lr": 0.1, "lam": 0.1} if kind == "scl" else {"lr": 0.1}
    groups = connection_groups(nn.Linear(2, 2))
    [name] = options
    sentence = f"{name} would do nothing with weight_rule '{rule}': leave it out"
    with pytest.raises(ValueError, match=sentence):
        make(groups, **settings, **options, weight_rule=rule)


@pytest.mark.parametrize(("rule", "options"), IDLE_OPTIONS)
def test_a_group_is_refused_what_would_do_nothing_for_it(
    rule: str, options: dict[str, Any]
) -> None:
    options = {**options, **({"betas": (0.8, 0.9)} if "betas" in options else {})}
    options = {**options, **({"eps": 1e-3} if "eps" in options else {})}
    groups = connection_groups(nn.Linear(2, 2), weight_rule=rule, **options)
    with pytest.raises(ValueError, match="would do nothing with weight_rule"):
        SCL(groups, lr=0.1, lam=0.1)


def test_each_group_has_the_settings_of_its_own_rule() -> None:
    """AdamW for the connections, SGD for the rest: both kinds of setting have a use."""
    layer = nn.Linear(2, 2)
    groups = connection_groups(layer, weight_rule="adamw")
    optimizer = SCL(groups, lr=0.1, lam=0.1, momentum=0.8, betas=(0.8, 0.9))
    connections, biases = optimizer.param_groups
    assert (connections["momentum"], connections["betas"]) == (0.0, (0.8, 0.9))
    assert (biases["momentum"], biases["betas"]) == (0.8, (0.9, 0.999))
    # As an engine may make one optimizer from another's groups.
    again = SCL(copy.deepcopy(optimizer.param_groups), lr=0.1, lam=0.1)
    assert [group["momentum"] for group in again.param_groups] == [0.0, 0.8]


def test_no_momentum_may_be_asked_of_adamw() -> None:
    SCL(connection_groups(nn.Linear(2, 2)), **MOVING, momentum=0.0, nesterov=False)
