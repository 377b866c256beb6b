"""Mask variables kept in bfloat16: unbiased, reproducible, and half the memory."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.kernels.reference import round_at_random
from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import Piece
from tests.sclcore.nets import mlp, mlp_batches, mse_step, train

OPTIONS: dict[str, Any] = {"lr": 0.05, "lam": 0.3, "mask_lr": 0.02, "mask_dtype": "bfloat16"}


def _piece(size: int, start: int = 0, *, unit: int = 1, total: int | None = None) -> Piece:
    tensor = Geometry("weight", (1, total or size), unit=unit)
    values = torch.zeros(size)
    return Piece(tensor, 0, start, values, values, values, values)


def _state_bytes(model: nn.Module, optimizer: SCL) -> float:
    """Bytes of state per weight of the connections."""
    weights = [p for g in optimizer.param_groups if g["connections"] for p in g["params"]]
    state = [v for p in weights for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in state) / sum(p.numel() for p in weights)


def test_memory_per_weight() -> None:
    """DESIGN.md §2: w, m and mask momentum are 12 bytes more than SGD with momentum has."""
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model = mlp()
        optimizer = SCL(connection_groups(model), **{**OPTIONS, "mask_dtype": dtype})
        train(model, optimizer, mlp_batches(2))
        sizes[dtype] = _state_bytes(model, optimizer)
    plain = mlp()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    mse_step(plain, sgd, mlp_batches(1)[0])
    buffer = sgd.state[plain.first.weight]["momentum_buffer"]
    assert sizes["float32"] == buffer.element_size() + 12
    # w and its momentum in float32; m and its momentum in bfloat16.
    assert sizes["bfloat16"] == 4 + 4 + 2 + 2


def test_state_is_in_bfloat16() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), **OPTIONS)
    train(model, optimizer, mlp_batches(20))
    state = optimizer.state[model.first.weight]
    assert state["mask"].dtype == state["mask_momentum_buffer"].dtype == torch.bfloat16
    assert state["weight"].dtype == state["momentum_buffer"].dtype == torch.float32
    assert 0.1 < sum(optimizer.live_connections().values()) / 192 < 0.9


@pytest.mark.parametrize("value", [1.0 + 2**-10, 0.3, -0.7, 1e-5, -3.0])
def test_rounding_is_unbiased(value: float) -> None:
    """The mean over many draws is the value itself."""
    size = 1 << 16
    exact = torch.full((size,), value)
    low = exact.view(torch.int32).bitwise_and(-65536).view(torch.float32)[0].item()
    step = math.ulp(1.0) * 2**45 * 2 ** (math.frexp(value)[1] - 1)  # of bfloat16 there: 2⁻⁷ at 1
    rounded = round_at_random(exact, _piece(size), noise=12345).double()
    share = abs(float(exact[0].double()) - low) / step
    # Nothing but the two neighbours is ever drawn, and bfloat16 holds both exactly.
    assert torch.equal(rounded, rounded.bfloat16().double())
    assert len(rounded.unique()) == 2 or share in (0.0, 1.0)
    # The mean of n independent draws has the deviation step · √(p(1−p)/n); 5 of them are exceeded
    # once in two million tries, and the draws here are fixed.
    deviation = step * math.sqrt(share * (1 - share) / size)
    assert abs(float(rounded.mean()) - float(exact[0].double())) <= 5 * deviation


def test_draws_of_neighbours_steps_and_tensors_are_unrelated() -> None:
    size = 1 << 14
    half = torch.full((size,), 1.0 + 2**-8)  # half-way between two numbers of bfloat16
    up = [
        round_at_random(half, _piece(size), noise=noise) > 1.0
        for noise in (1, 2, 0x2545F491, 2 * 0x2545F491, 0x9E3779B1, 1 ^ 0x5BD1E995)
    ]
    bits = torch.stack(up).double() * 2 - 1
    # Correlations of n independent signs have the deviation 1/√n.
    bound = 5 / math.sqrt(size)
    together = bits @ bits.T / size
    assert float((together - torch.eye(len(up))).abs().max()) < bound
    for lag in (1, 2, 3, 4, 16, 64, 576):
        assert abs(float((bits[0, lag:] * bits[0, :-lag]).mean())) < bound * 1.1, lag


def test_small_steps_add_up() -> None:
    """A thousand steps of a 1000th of what bfloat16 tells apart move the mean as in float32."""
    layer = nn.Linear(64, 64, bias=False)
    steps, rate = 1000, 2**-7 / 1000
    optimizer = SCL(
        connection_groups(layer),
        lr=0.0,
        lam=1.0,
        mask_lr=rate,
        mask_momentum=0.0,
        mask_dtype="bfloat16",
    )
    for _ in range(steps):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    m = optimizer.mask_variables()["weight"].double()
    # Below 1 bfloat16 has steps of 2⁻⁸. Each element is a random walk with jumps of that, one in
    # 500 steps: after 1000 its deviation is about 2⁻⁸ · √2, that of the mean of 4,096 a 64th of it.
    deviation = 2**-8 * math.sqrt(2) / 64
    assert abs(float(m.mean()) - (1 - steps * rate)) < 4 * deviation
    assert len(m.unique()) > 2, "each element went its own way"


def test_rounding_does_not_depend_on_how_a_tensor_is_cut() -> None:
    values = torch.randn(1000)
    whole = round_at_random(values, _piece(1000), noise=7)
    for start, length in ((0, 1), (1, 500), (333, 667)):
        part = round_at_random(
            values[start : start + length], _piece(length, start, total=1000), noise=7
        )
        assert torch.equal(part, whole[start : start + length])


def test_a_unit_is_rounded_as_one() -> None:
    values = torch.randn(100).repeat_interleave(9)
    rounded = round_at_random(values, _piece(900, unit=9), noise=3).view(100, 9)
    assert bool((rounded == rounded[:, :1]).all())
    assert not torch.equal(rounded[:, 0], values[::9].bfloat16().float()), "not to the nearest"


@pytest.mark.parametrize("granularity", ["weight", "feature"])
def test_training_is_deterministic_and_resumes_exactly(granularity: str) -> None:
    runs = []
    for _ in range(2):
        model = mlp()
        optimizer = SCL(connection_groups(model, granularity=granularity), **OPTIONS)
        train(model, optimizer, mlp_batches(40))
        runs.append((model, optimizer))
    (model, optimizer), (twin, _) = runs
    assert torch.equal(model.first.weight, twin.first.weight)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_model = mlp(seed=5)
    resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = SCL(connection_groups(resumed_model, granularity=granularity), lr=9.0, lam=9.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["updates"] == 40
    for batch in mlp_batches(60)[40:]:
        mse_step(model, optimizer, batch)
        mse_step(resumed_model, resumed, batch)
    for (name, p), q in zip(model.named_parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, m in optimizer.mask_variables().items():
        assert m.dtype == torch.bfloat16
        assert torch.equal(m, resumed.mask_variables()[name])


def test_another_count_of_updates_rounds_otherwise() -> None:
    """So the counter is needed: without it a resumed run would repeat its draws."""
    results = []
    for updates in (0, 1):
        model = mlp()
        optimizer = SCL(connection_groups(model), **OPTIONS)
        optimizer.param_groups[0]["updates"] = updates
        train(model, optimizer, mlp_batches(3))
        results.append(optimizer.mask_variables()["0.weight"])
    assert not torch.equal(*results)


def test_a_skipped_step_draws_nothing() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), **OPTIONS)
    train(model, optimizer, mlp_batches(3))
    grad = model.first.weight.grad
    assert grad is not None
    grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.param_groups[0]["updates"] == 3


def test_about_as_many_connections_as_in_float32() -> None:
    """Rounding is noise, not drift: λ means the same."""
    live = []
    for dtype in ("float32", "bfloat16"):
        model = mlp()
        optimizer = SCL(connection_groups(model), **{**OPTIONS, "mask_dtype": dtype})
        train(model, optimizer, mlp_batches(40))
        live.append(sum(optimizer.live_connections().values()))
    # Each step of m is about 0.02, and rounds by up to 2⁻⁸: a few of the 192 end up otherwise.
    assert abs(live[0] - live[1]) <= 20
    assert 20 < live[0] < 170
