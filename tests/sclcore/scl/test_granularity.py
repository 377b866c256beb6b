"""Coarser connections: kernels and features that live or die as wholes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sclcore import SCL, connection_groups
from tests.sclcore.nets import mse_step
from tests.sclcore.oracle import Textbook
from tests.sclcore.sharded import COARSE, MOVING, TWO_OF_FOUR, Case, Crossed, batches, network

STEPS = 120
OPTIONS: dict[str, Any] = {
    **MOVING,
    "momentum": 0.9,
    "nesterov": False,
    "proxy": "identity",
    "normalize": "feature",
}
NAMES = [f"{layer}.weight" for layer in ("conv", "depth", "up", "up2", "head", "out", "dense")]


def _by_name(values: dict[str, str]) -> dict[str, str]:
    """Layer → value, as connection_groups takes it, by parameter name."""
    return {f"{layer}.weight": value for layer, value in values.items()}


def _pair(
    granularity: dict[str, str], n_m: dict[str, str], **options: Any
) -> tuple[nn.Module, SCL, Textbook]:
    model = network(Case())
    # The guard is no part of the textbook: with 0 it never acts.
    groups = connection_groups(model, granularity=granularity, n_m=n_m or None, min_connections=0)
    settings = {**OPTIONS, **options}
    textbook = Textbook(
        model,
        costs=dict.fromkeys(NAMES, 1.0),
        granularity=_by_name(granularity),
        n_m=dict.fromkeys(_by_name(n_m), (2, 4)),
        **settings,
    )
    return model, SCL(groups, **settings), textbook


def _restart_from(textbook: Textbook, model: nn.Module, optimizer: SCL) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            textbook.velocity[name] = state["momentum_buffer"].clone()
            if name not in textbook.w:
                textbook.dense[name].copy_(p)
                continue
            textbook.w[name].copy_(state["weight"])
            # The first element of a unit speaks for all.
            shape = textbook.m[name].shape
            first = (..., *[0] * (p.ndim - len(shape)))
            textbook.m[name].copy_(state["mask"][first])
            textbook.mask_velocity[name] = state["mask_momentum_buffer"][first].clone()


@pytest.mark.parametrize(
    ("granularity", "n_m", "options"),
    [
        (COARSE, {}, {}),
        (COARSE, {}, {"normalize": "layer", "nesterov": True}),
        (COARSE, {}, {"proxy": "softplus"}),
        # Without normalisation: sums of G · w over up to 18 elements, each about 1e-4.
        (COARSE, {}, {"normalize": "none", "lam": 1e-4, "mask_lr": 1.0, "mask_init": 0.02}),
        ({"conv": "feature", "depth": "feature", "head": "feature", "out": "feature"}, {}, {}),
        ({"conv": "feature"}, TWO_OF_FOUR, {}),
        ({"up": "kernel"}, TWO_OF_FOUR, {"proxy": "leaky_relu"}),
    ],
    ids=["mixed", "layer", "softplus", "none", "feature", "n-m", "n-m-leaky"],
)
def test_agrees_with_the_textbook(
    granularity: dict[str, str], n_m: dict[str, str], options: dict[str, Any]
) -> None:
    model, optimizer, textbook = _pair(granularity, n_m, **options)
    before = optimizer.masks()
    deaths = revivals = 0
    for x, y in batches(Case(steps=STEPS)):
        mse_step(model, optimizer, (x, y))
        textbook.step(lambda forward, x=x, y=y: mse_loss(forward(x), y))
        if n_m and not deaths:
            # The first pass of SCL is dense, for masks begin with the first update.
            _restart_from(textbook, model, optimizer)
        masks = optimizer.masks()
        for name, mask in masks.items():
            expected = textbook.spread(name, textbook.steps(name).detach() > 0)
            assert torch.equal(mask, expected), name
            deaths += int((before[name] & ~mask).sum())
            revivals += int((~before[name] & mask).sum())
        before = masks
    # As in test_optimizer_oracle: 1e-16 per step, hardly amplified; any wrong term is 1e-3 or more.
    variables = optimizer.mask_variables()
    for name, w in textbook.w.items():
        state = optimizer.state[model.get_parameter(name)]
        torch.testing.assert_close(state["weight"], w.detach(), rtol=0, atol=1e-10)
        m = textbook.spread(name, textbook.m[name].detach())
        torch.testing.assert_close(variables[name], m, rtol=0, atol=1e-10)
    for name, value in textbook.effective().items():
        torch.testing.assert_close(
            model.get_parameter(name).detach(), value.detach(), rtol=0, atol=1e-10
        )
    assert deaths > 100 and revivals > 10


def _gradient_step(weight: Tensor, grad: Tensor, granularity: str, **options: Any) -> Tensor:
    """The step of m that one gradient causes, by hand: lr_m = 1, no momentum."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    settings = {"lr": 0.0, "mask_lr": 1.0, "mask_momentum": 0.0, "min_connections": 0, **options}
    optimizer = SCL(connection_groups(layer, granularity=granularity), **settings)
    layer.weight.grad = grad
    optimizer.step()
    return 1.0 - optimizer.mask_variables()["weight"]


def test_the_gradient_of_a_unit_is_the_sum_over_its_elements() -> None:
    weight, grad = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    kernels = (weight * grad).sum((2, 3), keepdim=True).expand_as(weight)
    step = _gradient_step(weight, grad, "kernel", lam=0.0, normalize="none")
    # Sums of 4 products in float32.
    torch.testing.assert_close(step, kernels, rtol=1e-5, atol=1e-6)
    features = (weight * grad).sum((1, 2, 3), keepdim=True).expand_as(weight)
    step = _gradient_step(weight, grad, "feature", lam=0.0, normalize="none")
    torch.testing.assert_close(step, features, rtol=1e-5, atol=1e-6)


def test_a_mask_variable_pays_once_however_many_weights_it_has() -> None:
    weight, grad = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    for granularity in ("weight", "kernel", "feature"):
        step = _gradient_step(weight, grad, granularity, lam=0.25)
        assert torch.equal(step, torch.full_like(step, 0.25))


def test_normalisation_is_over_mask_variables() -> None:
    """Kernels by the rms over those of the feature; features, of one each, by that of the layer."""
    weight = torch.ones(2, 2, 1, 2)[..., :1, :]
    grad = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]], [[[6.0, 0.0]], [[8.0, 0.0]]]])
    layer = nn.Conv2d(2, 2, (1, 2), bias=False)
    settings: dict[str, Any] = {
        "lr": 0.0,
        "lam": 0.0,
        "mask_lr": 1.0,
        "mask_momentum": 0.0,
        "min_connections": 0,
        "normalize": "feature",
    }
    steps = {}
    for granularity in ("kernel", "feature"):
        layer.weight = nn.Parameter(weight.clone())
        optimizer = SCL(connection_groups(layer, granularity=granularity), **settings)
        layer.weight.grad = grad
        optimizer.step()
        steps[granularity] = 1.0 - optimizer.mask_variables()["weight"][:, :, 0, 0]
    rms = (12.5) ** 0.5  # of 3 and 4
    expected = torch.tensor([[3.0, 4.0], [3.0, 4.0]]) / rms
    torch.testing.assert_close(steps["kernel"], expected)
    # 7 and 14, of which the rms is 7 · √2.5; divided by themselves they would both be 1.
    expected = torch.tensor([[1.0, 1.0], [2.0, 2.0]]) / 2.5**0.5
    torch.testing.assert_close(steps["feature"], expected)


def _trained(granularity: dict[str, str], n_m: dict[str, str], **options: Any) -> tuple[Any, SCL]:
    case = Case(steps=60)
    model = network(case)
    groups = connection_groups(model, granularity=granularity, n_m=n_m or None)
    optimizer = SCL(groups, **{**OPTIONS, **options})
    for batch in batches(case):
        mse_step(model, optimizer, batch)
    return model, optimizer


def test_units_live_and_die_as_wholes() -> None:
    model, optimizer = _trained(COARSE, {}, mask_restart=0.0)
    variables = optimizer.mask_variables()
    for layer, granularity in COARSE.items():
        p = model.get_parameter(f"{layer}.weight").detach()
        rows = p.flatten(0, 1) if granularity == "kernel" else p
        m = variables[f"{layer}.weight"].reshape(len(rows), -1)
        assert bool((m == m[:, :1]).all()), "all elements of a unit have the same m"
        dead = rows.flatten(1).eq(0).all(1)
        assert bool((rows.flatten(1)[~dead] != 0).all())
        assert 0 < int(dead.sum()) < len(dead), layer
    weights = model.out.weight.detach().eq(0)
    assert bool((weights.any(1) & ~weights.all(1)).any()), "the rest is decided one by one"


def test_the_last_pattern_that_matches_counts() -> None:
    model = Crossed()
    granularity = {"*": "kernel", "up*": "weight", "up2.weight": "kernel", "head": "feature"}
    n_m = {"out": "1:4", "*t": "2:4"}
    group = connection_groups(model, exclude=["dense"], granularity=granularity, n_m=n_m)[0]
    assert group["granularity"] == ["kernel", "kernel", "weight", "kernel", "feature", "kernel"]
    assert group["n_m"][-1] == (2, 4)
    group = connection_groups(model, granularity={"conv": "kernel"})[0]
    assert group["granularity"] == ["kernel", *["weight"] * 6], "weight where nothing matches"
    assert group["n_m"] == [None] * 7


@pytest.mark.parametrize("option", ["granularity", "n_m"])
def test_a_pattern_without_a_match_is_an_error(option: str) -> None:
    values: dict[str, Any] = {option: {"conv": "kernel", "haed": "kernel"}}
    with pytest.raises(ValueError, match=f"{option} pattern 'haed' matches no layer"):
        connection_groups(Crossed(), **values)


CHANNELS_LAST = [
    ({}, {}, {}),
    (COARSE, {}, {}),
    ({"conv": "feature", "depth": "feature"}, {}, {"normalize": "layer"}),
    ({}, {"head": "2:4"}, {}),
    ({}, {"conv": "2:6", "head": "2:4"}, {}),
]


@pytest.mark.parametrize(("granularity", "n_m", "options"), CHANNELS_LAST)
def test_channels_last_learns_the_same_network(
    granularity: dict[str, str], n_m: dict[str, str], options: dict[str, Any]
) -> None:
    case = Case(steps=60)
    plain = network(case)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pair: list[tuple[nn.Module, SCL]] = []
    for model in (plain, other):
        groups = connection_groups(model, granularity=granularity, n_m=n_m or None)
        optimizer = SCL(groups, **{**OPTIONS, **options})
        optimizer.observing = True
        pair.append((model, optimizer))
    for x, y in batches(case):
        mse_step(*pair[0], (x, y))
        mse_step(*pair[1], (x.to(memory_format=torch.channels_last), y))
        assert pair[0][1].mask_hash() == pair[1][1].mask_hash()
    assert not other.get_parameter("conv.weight").is_contiguous()
    assert pair[0][1].live_connections() == pair[1][1].live_connections()
    assert sum(pair[0][1].live_connections().values()) < 0.9 * 732
    variables = [optimizer.mask_variables() for _, optimizer in pair]
    for name, seen in pair[0][1].observations.items():
        # float64; the order in which a convolution adds is all that differs.
        twin = pair[1][1].observations[name]
        torch.testing.assert_close(seen.rms_before, twin.rms_before, rtol=1e-9, atol=1e-12)
        assert (seen.flips, seen.revivals) == (twin.flips, twin.revivals)
        torch.testing.assert_close(variables[0][name], variables[1][name], rtol=0, atol=1e-10)
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)


def test_state_saved_from_another_memory_format_is_continued() -> None:
    case = Case(steps=40)
    plain = network(case)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = SCL(connection_groups(plain, granularity=COARSE), **OPTIONS)
    for batch in batches(case)[:30]:
        mse_step(plain, first, batch)
    other.load_state_dict(plain.state_dict())
    second = SCL(connection_groups(other, granularity=COARSE), **OPTIONS)
    second.load_state_dict(first.state_dict())
    for batch in batches(case)[30:]:
        mse_step(plain, first, batch)
        mse_step(other, second, batch)
    assert first.mask_hash() == second.mask_hash()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)
