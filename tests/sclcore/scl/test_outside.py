"""What others write into parameters between two steps is not undone by the next step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sclcore import SCL, connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from sclcore.methods.rigl import RigL
from sclcore.methods.soft_threshold import SoftThreshold
from sclcore.optim.shards import Shard
from sclcore.optim.sparse import SparseOptimizer
from tests.sclcore.nets import Mlp, mlp, mlp_batches, mse_step, train


def _sparse(model: nn.Module, **options: Any) -> SCL:
    settings: dict[str, Any] = {"lr": 0.05, "lam": 0.4, "mask_lr": 0.02, **options}
    return SCL(connection_groups(model), **settings)


def _gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()


@pytest.fixture
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCL_FUSED", request.param)


@pytest.mark.parametrize("fused", ["0", "1"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("fused")
def test_a_state_loaded_after_the_first_step_is_what_is_trained(dtype: torch.dtype) -> None:
    batches = mlp_batches(12, dtype=dtype)
    model, other = mlp(dtype=dtype), mlp(dtype=dtype, seed=7)
    optimizer = _sparse(model, lam=0.0, mask_lr=0.0, momentum=0.0)
    train(model, optimizer, batches[:5])
    model.load_state_dict(other.state_dict())
    beside = _sparse(other, lam=0.0, mask_lr=0.0, momentum=0.0)
    train(model, optimizer, batches[5:])
    train(other, beside, batches[5:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_values_of_dead_connections_are_named_once_and_are_0() -> None:
    model, optimizer, batches = mlp(), None, mlp_batches(61)
    optimizer = _sparse(model)
    train(model, optimizer, batches[:60])
    dead = ~optimizer.masks()["0.weight"]
    assert 10 < int(dead.sum()) < dead.numel()
    loaded = mlp(seed=7)
    model.load_state_dict(loaded.state_dict())
    with pytest.warns(UserWarning, match=r"into 0.weight and 1 more .* dead connections") as said:
        optimizer.read_weights()
    assert "\n" not in str(said[0].message)
    assert torch.equal(model.first.weight, loaded.first.weight * ~dead)
    assert torch.equal(optimizer.state[model.first.weight]["weight"], loaded.first.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(loaded.state_dict())
        mse_step(model, optimizer, batches[60])
    assert not model.first.weight[~optimizer.masks()["0.weight"]].any()


def test_the_optimizers_own_state_has_the_last_word() -> None:
    """As when a run is resumed: model and optimizer loaded, in either order."""
    first, batches = mlp(), mlp_batches(40)
    optimizer = _sparse(first)
    train(first, optimizer, batches[:20])
    weights, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(first, optimizer, batches[20:30])
    latent = optimizer.state[first.first.weight]["weight"]
    for order in ("model first", "optimizer first"):
        if order == "model first":
            first.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        first.load_state_dict(weights)
        saved = optimizer.state_dict()
        for index, values in saved["state"].items():
            for key, value in values.items():
                assert torch.equal(value, state["state"][index][key]), (order, key)
    assert latent is not optimizer.state[first.first.weight]["weight"]


def _swapped_in_and_out(model: nn.Module) -> None:
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(mlp(seed=7).state_dict())
    model.load_state_dict(kept)


def _moved(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def _set_to_themselves(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.clone())


def _clipped(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e3)


@pytest.mark.parametrize("between", [_swapped_in_and_out, _moved, _set_to_themselves, _clipped])
def test_what_changes_no_value_changes_no_result(between: Callable[[nn.Module], None]) -> None:
    """Averages swapped in for an evaluation, say; latent weights of what is dead stay too."""
    one, two, batches = mlp(), mlp(), mlp_batches(60)
    first, second = _sparse(one), _sparse(two)
    train(one, first, batches)
    for batch in batches:
        _gradients(two, batch)
        between(two)
        second.step()
    assert first.mask_hash() == second.mask_hash()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)


def test_a_loop_may_clamp_its_weights() -> None:
    model, batches = mlp(), mlp_batches(30)
    optimizer = _sparse(model, lr=0.3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for batch in batches:
            with torch.enable_grad():
                mse_step(model, optimizer, batch)
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
        optimizer.state_dict()
    for p in (model.first.weight, model.second.weight):
        live = optimizer.state[p]["mask"] > 0
        latent = optimizer.state[p]["weight"]
        assert latent[live].abs().max() <= 0.1, "not what it was before"
        assert torch.equal(p, torch.where(live, latent, 0.0))


def test_a_state_saved_before_the_next_step_has_the_new_values() -> None:
    model = mlp()
    optimizer = _sparse(model, lam=0.0)
    mse_step(model, optimizer, mlp_batches(1)[0])
    for values in (mlp(seed=7), mlp(seed=8)):
        model.load_state_dict(values.state_dict())
        _moved(model)
        saved = optimizer.state_dict()["state"][0]["weight"]
        assert torch.equal(saved, values.first.weight)


def test_writes_that_pytorch_does_not_see_can_be_read() -> None:
    model = mlp()
    optimizer = _sparse(model, lam=0.0)
    mse_step(model, optimizer, mlp_batches(1)[0])
    model.first.weight.data.mul_(2)
    now = model.first.weight.detach().clone()
    optimizer.read_weights()
    assert torch.equal(optimizer.state[model.first.weight]["weight"], now)


def test_parameters_that_cannot_be_seen_flat_are_read_as_well() -> None:
    """channels_last and N:M: what the step works on is a copy."""
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = SCL(connection_groups(layer, n_m="2:4"), lr=0.1, lam=0.0)
    x = torch.randn(2, 4, 5, 5)
    layer(x).sum().backward()
    optimizer.step()
    assert not layer.weight.is_contiguous()
    with torch.no_grad():
        layer.weight.mul_(2)
    doubled = layer.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    live = optimizer.masks()["weight"]
    kept = live & (doubled != 0)
    assert kept.any() and torch.equal(layer.weight[kept], doubled[kept])


@pytest.mark.usefixtures("alone")
def test_flat_slices() -> None:
    """As ZeRO has it: one flat tensor stands for the group."""
    model = mlp()
    optimizer = _sparse(model, lam=0.0, momentum=0.0, mask_lr=0.0)
    group = optimizer.param_groups[0]
    shards, offset = [], 0
    for name, shape in zip(group["names"], group["shapes"], strict=True):
        size = shape[0] * shape[1]
        shards.append(Shard(name, shape, 0, size, offset))
        offset += size
    slice_ = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
    group["params"] = [slice_]
    assert dist.group.WORLD is not None
    optimizer.set_shards({0: shards}, dist.group.WORLD)
    slice_.grad = torch.ones_like(slice_)
    optimizer.step()
    with torch.no_grad():
        slice_.fill_(0.5)
    optimizer.step()
    assert torch.equal(slice_, torch.full_like(slice_, 0.5 - 0.05))


@pytest.mark.usefixtures("alone")
def test_fsdp() -> None:
    model, batches = mlp(), mlp_batches(3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = _sparse(model, lam=0.0, mask_lr=0.0)
    train(model, optimizer, batches[:2])
    params = optimizer.param_groups[0]["params"]
    assert optimizer._written.touched(params) == [], "nor does FSDP write into them"
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)
    halved = [p.to_local().detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    mse_step(model, optimizer, batches[2])
    for p, value in zip(params, halved, strict=True):
        assert torch.equal(p.to_local(), value)


Make = Callable[[Mlp], SparseOptimizer]
BASELINES: dict[str, Make] = {
    "magnitude": lambda m: Driver(Magnitude(density=0.3), connection_groups(m), lr=0.0),
    "rigl": lambda m: Driver(RigL(density=0.3), connection_groups(m), lr=0.0),
    "soft threshold": lambda m: Driver(
        SoftThreshold(s_init=-3.0, s_weight_decay=0.0), connection_groups(m), lr=0.0
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_the_methods_to_compare_with_take_values_over_as_well(name: str) -> None:
    model, batches = mlp(), mlp_batches(4)
    optimizer = BASELINES[name](model)
    for group in optimizer.param_groups:
        group["progress"] = 1.0
    train(model, optimizer, batches[:2])
    loaded = mlp(seed=7)
    model.load_state_dict(loaded.state_dict())
    with warnings.catch_warnings(record=True):
        mse_step(model, optimizer, batches[2])
    live = optimizer.masks()["0.weight"]
    # A soft threshold keeps whatever is not 0.
    assert 0 < int(live.sum()) < live.numel() or name == "soft threshold"
    expected = torch.where(live, loaded.first.weight, 0.0)
    torch.testing.assert_close(model.first.weight, expected, rtol=0, atol=1e-6)
    assert not model.first.weight[~live].any()
