"""Shared weights that are trained: the paper's formula by autograd; nothing dies or revives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import Scheduler, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.share import Share
from sclcore.schedule import Schedule
from sclcore.sharing import Sharing, share, shared_weight
from tests.sclcore.nets import Mixed, Mlp, mixed_batches, mlp, mlp_batches, mse_step

STEPS = 30
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2}
CONNECTIONS = ("0.weight", "2.weight")


def sparse(model: nn.Module, density: float = 0.6) -> nn.Module:
    """Zeros in the connections, so that there is something to keep dead."""
    generator = torch.Generator().manual_seed(3)
    [group, *_] = connection_groups(model)
    with torch.no_grad():
        for _, weight in group["params"]:
            weight.mul_(torch.rand(weight.shape, generator=generator) < density)
    return model


def driver(model: nn.Module, values: int = 5, by: str = "kmeans", **options: Any) -> Driver:
    method = Share.model_validate({"values": values, "by": by})
    return Driver(method, connection_groups(model), **SGD | options)


def train(
    model: nn.Module, optimizer: Driver, batches: list[tuple[Tensor, Tensor]], steps: range
) -> None:
    scheduler = Scheduler(optimizer, Schedule(lr_warmup=0.1))
    for step in steps:
        scheduler.set_progress(step / STEPS)
        optimizer.before_update()
        mse_step(model, optimizer, batches[step])


class SharedLinear(nn.Module):
    """v = c[I] with 0 for what is dead, differentiated by autograd."""

    def __init__(self, linear: nn.Linear, values: int) -> None:
        super().__init__()
        found, index = share(linear.weight, Sharing("kmeans", values))
        self.live = linear.weight.detach() != 0
        self.c = nn.Parameter(found.clone())
        self.index = torch.zeros(self.live.shape, dtype=torch.int64)
        self.index[self.live] = index
        self.b = nn.Parameter(linear.bias.detach().clone())

    def effective(self) -> Tensor:
        return torch.where(self.live, self.c[self.index], 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective(), self.b)


@pytest.mark.parametrize("nesterov", [False, True])
def test_values_move_by_the_gradient_of_autograd(nesterov: bool) -> None:
    model = sparse(mlp(dtype=torch.float64))
    assert isinstance(model, Mlp)
    layers = SharedLinear(model.first, 5), SharedLinear(model.second, 5)
    book, batches = nn.Sequential(layers[0], nn.Tanh(), layers[1]), mlp_batches(STEPS)
    batches = [(x.double(), y.double()) for x, y in batches]
    theirs = torch.optim.SGD(
        [
            {"params": [layer.c for layer in layers], "weight_decay": SGD["weight_decay"]},
            {"params": [layer.b for layer in layers], "weight_decay": 0.0},
        ],
        lr=SGD["lr"],
        momentum=SGD["momentum"],
        nesterov=nesterov,
    )
    scheduler = Scheduler(theirs, Schedule(lr_warmup=0.1))
    for step in range(STEPS):
        scheduler.set_progress(step / STEPS)
        mse_step(book, theirs, batches[step])
    before = model.first.weight.detach().clone()
    train(model, driver(model, nesterov=nesterov), batches, range(STEPS))
    for mine, layer in zip((model.first, model.second), layers, strict=True):
        # Both sum the same numbers in double, in another order.
        assert torch.allclose(mine.weight, layer.effective(), rtol=0, atol=1e-12)
        assert torch.allclose(mine.bias, layer.b, rtol=0, atol=1e-12)
    assert not torch.allclose(model.first.weight, before, atol=1e-3), "nothing has moved"


@pytest.mark.parametrize("by", ["kmeans", "pq"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_few_values_at_every_update_and_a_resume_bit_for_bit(by: str, rule: str) -> None:
    batches = mixed_batches(torch.float32, STEPS)
    options: dict[str, Any] = {"by": by, "weight_rule": rule}
    if rule == "adamw":
        options |= {"momentum": 0.0, "lr": 1e-3}
    torch.manual_seed(0)
    whole = sparse(Mixed())
    first, other = copy.deepcopy(whole), Mixed()
    zeros = {name: p == 0 for name, p in whole.named_parameters()}
    optimizer = driver(whole, **options)
    for step in range(STEPS):
        train(whole, optimizer, batches, range(step, step + 1))
        for name, weight in whole.named_parameters():
            if name in optimizer.connection_names:
                assert torch.equal(weight == 0, zeros[name]), (step, name)
                assert len(weight[weight != 0].unique()) <= 5, (step, name)
    assert all(torch.equal(~mask, zeros[name]) for name, mask in optimizer.masks().items())

    interrupted = driver(first, **options)
    train(first, interrupted, batches, range(13))
    resumed = driver(other, **options)
    other.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    train(other, resumed, batches, range(13, STEPS))
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_first_forward_pass_has_shared_weights() -> None:
    model = sparse(mlp())
    wanted = [shared_weight(p, Sharing("kmeans", 3)) for p in model.parameters() if p.ndim > 1]
    optimizer = driver(model, values=3)
    optimizer.before_update()
    found = [p for p in model.parameters() if p.ndim > 1]
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    # An engine that starts anew from these finds the same values.
    optimizer.state.clear()
    optimizer.before_update()
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_draws_are_those_of_the_seed_and_not_of_the_process() -> None:
    def weights(seed: int, process_seed: int) -> Tensor:
        model = sparse(mlp())
        torch.manual_seed(process_seed)
        driver(model, by="pq", seed=seed).before_update()
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1, 1), weights(1, 2))
    assert not torch.equal(weights(1, 1), weights(2, 1))


def test_what_others_write_becomes_means_and_nothing_revives() -> None:
    model, batches = sparse(mlp()), mlp_batches(4)
    optimizer = driver(model, lr=0.0)
    train(model, optimizer, batches, range(2))
    live, before = optimizer.masks()["0.weight"], dict(model.named_parameters())["0.weight"].clone()
    loaded = mlp(seed=7)
    model.load_state_dict(loaded.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, batches, range(2, 3))
    assert "0.weight" in str(said[0].message)
    weight = dict(model.named_parameters())["0.weight"]
    assert not weight[~live].any() and torch.equal(optimizer.masks()["0.weight"], live)
    for value in before[live].unique():
        members = before == value
        expected = loaded.first.weight[members].mean().expand(int(members.sum()))
        assert torch.allclose(weight[members], expected, atol=1e-6)


def test_a_layer_that_is_dead_stays_so() -> None:
    model = sparse(mlp())
    assert isinstance(model, Mlp)
    with torch.no_grad():
        model.second.weight.zero_()
    optimizer = driver(model)
    train(model, optimizer, mlp_batches(4), range(4))
    live = optimizer.live_connections()
    assert live["2.weight"] == 0 < live["0.weight"] and not model.second.weight.any()
    assert bool(model.second.bias.any())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, batches = sparse(mlp()), mlp_batches(4)
    optimizer = driver(model)
    train(model, optimizer, batches, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    mse_step(model, optimizer, (batches[2][0] * torch.inf, batches[2][1]))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values\n.*greater than or equal to 2"):
        driver(mlp(), values=1)
    with pytest.raises(ValueError, match=r"by\n.*'kmeans' or 'pq'"):
        driver(mlp(), by="median")
    model = mlp()
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        driver(model).before_update()
