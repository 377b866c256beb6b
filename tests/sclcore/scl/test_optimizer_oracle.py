"""SCL agrees with the textbook form (oracle.py) over whole trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.kernels.proxies import PROXIES
from sclcore.scl.settings import NORMALIZATIONS
from tests.sclcore.nets import MIXED_USES, Mixed, mixed_batches
from tests.sclcore.oracle import Textbook, connections_of

STEPS = 200

# Of each two of the three, such as proxy and cost, every pair of values is in the first tier.
FACTORS = [
    pytest.param(proxy, normalize, cost, marks=[pytest.mark.long] if (p + n + c) % 2 else [])
    for p, proxy in enumerate(PROXIES)
    for n, normalize in enumerate(NORMALIZATIONS)
    for c, cost in enumerate(["connections", "macs"])
]

# λ and the steps are in units of the mask gradient: 1 when it is normalised, about 1/1000 here when
# it is not. Such that masks die and revive within the 200 steps.
_SCALE: dict[str, dict[str, float]] = {
    "none": {"lam": 1e-4, "mask_lr": 0.2, "mask_init": 0.02, "mask_restart": 0.01},
}

# A bias before batch norm has a gradient of pure rounding, 1e-17: divided by its own root mean
# square, only eps keeps it that small.
ADAMW: dict[str, Any] = {
    "weight_rule": "adamw",
    "momentum": 0.0,
    "betas": (0.9, 0.95),
    "eps": 1e-6,
    "lr": 0.01,
    "weight_decay": 0.05,
}


def _options(proxy: str, normalize: str, **more: Any) -> dict[str, Any]:
    return {
        "lr": 0.05,
        "momentum": 0.9,
        "mask_momentum": 0.8,
        "weight_decay": 1e-3,
        "nesterov": False,
        "proxy": proxy,
        "normalize": normalize,
        "lam": 0.05,
        "mask_lr": 0.02,
        "mask_restart": 0.1,
        **_SCALE.get(normalize, {}),
        **more,
    }


def _pair(
    dtype: torch.dtype, cost: str, options: dict[str, Any], attention: bool = False
) -> tuple[nn.Module, SCL, Textbook]:
    model = Mixed(attention).to(dtype)
    # The guard is no part of the textbook: with 0 it never acts.
    groups = connection_groups(
        model, cost=cost, example_input=torch.zeros(1, 2, 6, 6, dtype=dtype), min_connections=0
    )
    sizes = {n: p.numel() for n, p in model.named_parameters() if n in MIXED_USES}
    mean = sum(sizes[n] * MIXED_USES[n] for n in sizes) / sum(sizes.values())
    costs = {n: MIXED_USES[n] / mean if cost == "macs" else 1.0 for n in sizes}
    return model, SCL(groups, **options), Textbook(model, costs=costs, **options)


def _loss_on(batch: tuple[Tensor, Tensor]) -> Callable[[Callable[..., Tensor]], Tensor]:
    return lambda forward: nn.functional.mse_loss(forward(batch[0]), batch[1])


def _scl_step(model: nn.Module, optimizer: SCL, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    _loss_on(batch)(model).backward()
    optimizer.step()


def _latent(model: nn.Module, optimizer: SCL, key: str) -> dict[str, Tensor]:
    names = connections_of(model)
    return {n: optimizer.state[p][key] for n, p in model.named_parameters() if n in names}


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].detach() - b[k].detach()).abs().max()) for k in a)


def _compare_run(cost: str, options: dict[str, Any], attention: bool = False) -> tuple[int, int]:
    """Train both in float64, compare throughout; returns (deaths, revivals)."""
    model, optimizer, textbook = _pair(torch.float64, cost, options, attention)
    batches = mixed_batches(torch.float64)
    before = {n: torch.ones_like(w, dtype=torch.bool) for n, w in textbook.w.items()}
    deaths = revivals = 0
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        _scl_step(model, optimizer, batch)
        textbook.step(_loss_on(batch))
        masks = optimizer.masks()
        for name, mask in masks.items():
            assert torch.equal(mask, textbook.m[name] > 0), f"{name} at step {step}"
            deaths += int((before[name] & ~mask).sum())
            revivals += int((~before[name] & mask).sum())
        before = masks
    # Each step rounds by about 1e-16 and 200 steps of a contracting training amplify that little;
    # 1e-10 leaves room for a feature whose gradient is nearly 0 before it is normalised, and is
    # far below the 1e-3 and more that any wrong term would make.
    assert _difference(_latent(model, optimizer, "weight"), textbook.w) < 1e-10
    assert _difference(_latent(model, optimizer, "mask"), textbook.m) < 1e-10
    effective = {n: p.detach() for n, p in model.named_parameters()}
    assert _difference(effective, textbook.effective()) < 1e-10
    return deaths, revivals


@pytest.mark.parametrize(("proxy", "normalize", "cost"), FACTORS)
def test_agrees_in_float64(proxy: str, normalize: str, cost: str) -> None:
    deaths, revivals = _compare_run(cost, _options(proxy, normalize))
    # The comparison means something only if masks moved; 138 connections in all.
    assert deaths >= 10
    if not PROXIES[proxy].positive:
        assert revivals == 0, "nothing can move a mask variable below 0 where the slope is 0"
    elif (proxy, normalize) != ("leaky_relu", "none"):  # a tenth of a small slope: 200 is too few
        assert revivals >= 3


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"nesterov": True},
        {"momentum": 0.0, "mask_momentum": 0.0, "weight_decay": 0.0, "mask_lr": 0.1},
        {"mask_init": 0.2},
        {"mask_restart": 0.0},
        {"mask_gradient": "root"},
        {"proxy": "softplus", "normalize": "layer"},
        ADAMW,
        {**ADAMW, "normalize": "layer", "betas": (0.8, 0.999), "eps": 1e-5},
    ],
    ids=[
        "default",
        "nesterov",
        "no-momentum",
        "low-init",
        "no-restart",
        "root",
        "softplus-layer",
        "adamw",
        "adamw2",
    ],
)
def test_agrees_in_float64_with_attention(more: dict[str, Any]) -> None:
    options = {**_options("identity", "feature"), **more}
    deaths, revivals = _compare_run("macs", options, attention=True)
    assert deaths >= 30  # of 282
    assert revivals >= 10


@pytest.mark.parametrize(("proxy", "normalize", "cost"), FACTORS)
def test_agrees_in_float32_step_by_step(proxy: str, normalize: str, cost: str) -> None:
    """Along SCL's own training, the textbook restarts from SCL's state at each step.

    So rounding cannot grow into other masks, and every single step is held to rounding.
    """
    model, optimizer, textbook = _pair(torch.float32, cost, _options(proxy, normalize), True)
    batches = mixed_batches(torch.float32)
    for step in range(STEPS // 2):
        batch = batches[step % len(batches)]
        textbook.step(_loss_on(batch))
        _scl_step(model, optimizer, batch)
        mask, weight = _latent(model, optimizer, "mask"), _latent(model, optimizer, "weight")
        for name, m in mask.items():
            # Both take the same G; the rest is a few sums and products of numbers of order 1 (the
            # normalised gradient reaches the square root of the size of a feature, its step is
            # mask_lr ≤ 0.5 times that): some units of 1.2e-7, so 2e-6 is a generous dozen.
            assert torch.allclose(m, textbook.m[name], rtol=2e-6, atol=2e-6), f"{name}, {step}"
            assert torch.allclose(weight[name], textbook.w[name], rtol=2e-6, atol=2e-6), name
            differs = (m > 0) != (textbook.m[name] > 0)
            assert bool((m[differs].abs() < 2e-6).all()), f"{name}, step {step}"
        _restart_from(textbook, model, optimizer)


def _restart_from(textbook: Textbook, model: nn.Module, optimizer: SCL) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            if name in textbook.w:
                textbook.w[name].copy_(state["weight"])
                textbook.m[name].copy_(state["mask"])
                textbook.mask_velocity[name] = state["mask_momentum_buffer"].clone()
            else:
                textbook.dense[name].copy_(p)
            textbook.velocity[name] = state["momentum_buffer"].clone()


def test_a_wrong_term_would_be_seen() -> None:
    """The oracle has teeth: normalising ConvTranspose along the wrong dimension is noticed."""
    options = _options("identity", "feature")
    model, optimizer, textbook = _pair(torch.float64, "connections", options)
    for group in optimizer.param_groups:
        if group["connections"]:
            group["transposed_groups"] = [0] * len(group["params"])
    batch = mixed_batches(torch.float64, 1)[0]
    _scl_step(model, optimizer, batch)
    textbook.step(_loss_on(batch))
    mask = _latent(model, optimizer, "mask")
    assert _difference({"up": mask["up.weight"]}, {"up": textbook.m["up.weight"]}) > 1e-4
    mask = copy.copy(mask)
    others = {n: m for n, m in textbook.m.items() if n != "up.weight"}
    assert _difference({n: mask[n] for n in others}, others) < 1e-12
