"""Masks that a loop of one's own chooses, before the first step or between two."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sclcore import SCL, connection_groups
from sclcore.optim.shards import Shard
from tests.sclcore.nets import mlp, mlp_batches, train


def _sparse(model: nn.Module, **options: Any) -> SCL:
    settings: dict[str, Any] = {"lr": 0.05, "lam": 0.4, "mask_lr": 0.02, **options}
    return SCL(connection_groups(model), **settings)


def _half(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.5


def test_masks_chosen_before_the_first_step_are_what_it_starts_with() -> None:
    model = mlp()
    start = model.first.weight.detach().clone()
    optimizer = _sparse(model, mask_init=0.3)
    chosen = _half(16, 8)
    optimizer.set_masks({"0.weight": chosen})
    assert torch.equal(model.first.weight, start * chosen)
    assert list(optimizer.mask_variables()) == ["0.weight"], "the other one starts when it is used"
    m = optimizer.mask_variables()["0.weight"]
    assert torch.equal(m, torch.where(chosen, 0.3, -0.3))
    assert torch.equal(optimizer.masks()["0.weight"], chosen)
    assert optimizer.masks()["2.weight"].all()
    assert torch.equal(optimizer.state[model.first.weight]["weight"], start), "it may come back"


def test_frozen_masks_stay_as_they_were_chosen_while_weights_learn() -> None:
    """A network pruned elsewhere, trained further: dead connections stay exactly 0."""
    model = mlp()
    optimizer = _sparse(model, mask_lr=0.0, lam=0.0)
    chosen = {"0.weight": _half(16, 8), "2.weight": _half(4, 16)}
    optimizer.set_masks(chosen)
    losses = train(model, optimizer, [mlp_batches(1)[0]] * 30)
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in (("0.weight", model.first.weight), ("2.weight", model.second.weight)):
        assert torch.equal(weight != 0, chosen[name]), "nothing comes back"
        assert torch.equal(optimizer.masks()[name], chosen[name])
    optimizer.set_masks({"2.weight": torch.zeros(4, 16, dtype=torch.bool)})
    train(model, optimizer, mlp_batches(3))
    assert not model.second.weight.any(), "not even in a layer that is all dead"
    assert optimizer.held_layers == []


def test_masks_that_learn_go_on_from_those_chosen() -> None:
    """By hand: one step from mask variables chosen as floats, without momentum."""
    model = mlp()
    optimizer = _sparse(model, normalize="none", lr=0.0, lam=0.25, mask_lr=0.1)
    train(model, optimizer, mlp_batches(5))
    latent = optimizer.state[model.first.weight]["weight"].clone()
    given = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    others = optimizer.mask_variables()["2.weight"].clone()
    optimizer.set_masks({"0.weight": given})
    assert torch.equal(optimizer.mask_variables()["2.weight"], others)
    train(model, optimizer, mlp_batches(1))
    assert model.first.weight.grad is not None
    expected = given - 0.1 * (model.first.weight.grad * latent + 0.25)
    torch.testing.assert_close(optimizer.mask_variables()["0.weight"], expected)
    torch.testing.assert_close(model.first.weight, torch.where(expected > 0, latent, 0.0))


def test_a_layer_below_its_minimum_gets_its_best_back_when_masks_learn() -> None:
    model = mlp()
    optimizer = _sparse(model, min_connections=3)
    m = torch.linspace(-2, -1, 64).view(4, 16)
    optimizer.set_masks({"2.weight": m})
    assert not model.second.weight.any()
    train(model, optimizer, mlp_batches(1))
    assert optimizer.held_layers == ["2.weight"]
    assert optimizer.live_connections()["2.weight"] == 3


def test_weights_loaded_just_before_are_the_weights() -> None:
    """A sparse network is taken over in the midst of a training, which is no reason to warn."""
    model, loaded = mlp(), mlp(seed=7)
    optimizer = _sparse(model)
    train(model, optimizer, mlp_batches(60))
    model.load_state_dict(loaded.state_dict())
    chosen = _half(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_masks({"0.weight": chosen})
    assert torch.equal(model.first.weight, loaded.first.weight * chosen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_and_coarse_units(dtype: str) -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = layer.weight.detach().clone()
    for granularity in ("weight", "kernel"):
        with torch.no_grad():
            layer.weight.copy_(start)
        groups = connection_groups(layer, granularity=granularity)
        optimizer = SCL(groups, lr=0.1, lam=0.1, mask_dtype=dtype)
        chosen = _half(6, 4, 1, 1).expand(6, 4, 3, 3)
        optimizer.set_masks({"weight": chosen})
        assert torch.equal(optimizer.masks()["weight"], chosen)
        assert torch.equal(layer.weight, torch.where(chosen, start, 0.0))


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"0.wieght": _half(16, 8)}, "is called 0.wieght: did you mean 0.weight?"),
        ({"x": _half(16, 8)}, "is called x: there are 0.weight, 2.weight"),
        ({"0.weight": _half(8, 16)}, r"0.weight must have the shape \(16, 8\), not \(8, 16\)"),
        ({"0.weight": _half(16, 8).long()}, r"must be bool .* pass mask.bool\(\)"),
        ({"0.weight": torch.full((16, 8), torch.nan)}, "0.weight must be finite"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, Tensor], words: str) -> None:
    model = mlp()
    optimizer = _sparse(model)
    with pytest.raises(ValueError, match=words) as error:
        optimizer.set_masks({"2.weight": _half(4, 16)} | masks)
    assert "\n" not in str(error.value)
    assert not optimizer.state and model.second.weight.all(), "nothing was done by halves"


def test_what_granularity_and_n_m_do_not_allow_is_refused() -> None:
    layer = nn.Conv2d(4, 6, 3)
    coarse = SCL(connection_groups(layer, granularity="kernel"), lr=0.1, lam=0.1)
    with pytest.raises(ValueError, match="differs within one of its units of 9 weights"):
        coarse.set_masks({"weight": _half(6, 4, 3, 3)})
    row = nn.Linear(8, 4)
    paired = SCL(connection_groups(row, n_m="2:4"), lr=0.1, lam=0.1)
    with pytest.raises(ValueError, match="more than 2 live among 4 neighbours"):
        paired.set_masks({"weight": torch.ones(4, 8, dtype=torch.bool)})
    chosen = torch.tensor([True, False, False, True]).repeat(4, 2)
    paired.set_masks({"weight": chosen})
    assert torch.equal(paired.masks()["weight"], chosen)


@pytest.mark.usefixtures("alone")
def test_slices_of_a_flat_tensor_take_their_part() -> None:
    """In another order than the group's; on several ranks: `meddled` in test_shards."""
    model = mlp()
    optimizer = _sparse(model)
    group = optimizer.param_groups[0]
    first, second = (p.detach().flatten() for p in group["params"])
    flat = nn.Parameter(torch.cat([second, first]))
    start = flat.detach().clone()
    group["params"] = [flat]
    shards = [Shard("2.weight", (4, 16), 0, 64, 0), Shard("0.weight", (16, 8), 0, 128, 64)]
    assert dist.group.WORLD is not None
    optimizer.set_shards({0: shards}, dist.group.WORLD)
    one, two = _half(16, 8), ~_half(4, 16)
    optimizer.set_masks({"0.weight": one, "2.weight": two})
    live = torch.cat([two.flatten(), one.flatten()])
    assert torch.equal(flat, torch.where(live, start, 0.0))


@pytest.mark.usefixtures("alone")
def test_fsdp() -> None:
    model = mlp()
    start = model.first.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = _sparse(model)
    optimizer.set_masks({"0.weight": _half(16, 8)})
    whole = model.first.weight.full_tensor()  # type: ignore[operator]
    assert torch.equal(whole, torch.where(_half(16, 8), start, 0.0))
