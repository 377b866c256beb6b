"""N:M: at most N live connections among every M neighbours, and which ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from tests.sclcore.nets import Mlp, mlp, mlp_batches, mse_step
from tests.sclcore.oracle import best_of_blocks

OPTIONS: dict[str, Any] = {"lr": 0.05, "lam": 0.1, "mask_lr": 0.02}


def _train(n_m: str | Mapping[str, str], steps: int = 60, **options: Any) -> tuple[Mlp, SCL]:
    """Trained, and asserted to be N:M after every step."""
    model = mlp()
    optimizer = SCL(connection_groups(model, n_m=n_m), **{**OPTIONS, **options})
    group = optimizer.param_groups[0]
    for batch in mlp_batches(steps):
        mse_step(model, optimizer, batch)
        for p, pattern in zip(group["params"], group["n_m"], strict=True):
            if pattern:
                n, m = pattern
                assert int(_per_block(p.detach(), m).max()) <= n
    return model, optimizer


def _per_block(weight: Tensor, m: int) -> Tensor:
    """Live connections of each block, counted one by one."""
    rows = weight.flatten(1)
    return torch.tensor(
        [
            [int((row[i : i + m] != 0).sum()) for i in range(0, rows.shape[1], m)]
            for row in rows.unbind()
        ]
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "3:8"])
def test_at_most_n_of_m_at_every_step(pattern: str) -> None:
    model, _ = _train(pattern, lam=0.0)
    n, m = (int(part) for part in pattern.split(":"))
    # Without λ, the pattern alone prunes, and leaves its n alone.
    assert float((_per_block(model.first.weight.detach(), m) == n).float().mean()) > 0.9


def test_lambda_prunes_further() -> None:
    _, free = _train("2:4", lam=0.0)
    model, priced = _train("2:4", lam=0.4)
    live = [sum(o.live_connections().values()) for o in (free, priced)]
    assert live[1] < 0.7 * live[0]
    assert {0, 1, 2} == set(_per_block(model.first.weight.detach(), 4).flatten().tolist())


def test_layers_without_the_pattern_stay_free() -> None:
    model, _ = _train({"0": "2:4"}, lam=0.0)
    assert int(_per_block(model.second.weight.detach(), 4).max()) > 2


def test_the_best_mask_variables_are_chosen() -> None:
    _, optimizer = _train("2:4")
    masks = optimizer.masks()
    changed = 0
    for name, m in optimizer.mask_variables().items():
        assert torch.equal(masks[name], (m > 0) & best_of_blocks(m, (2, 4))), name
        # A choice was made among those above 0.
        changed += int(((m > 0) & ~masks[name]).sum())
    assert changed > 10


def test_which_ones_are_chosen_is_learned() -> None:
    """Not what the initial weights had in store: some connections take the place of others."""
    _, early = _train("2:4", steps=1)
    model, late = _train("2:4", steps=60, lam=0.0)
    one, two = early.masks()["0.weight"], late.masks()["0.weight"]
    assert int((two & ~one).sum()) >= 5
    assert torch.equal(model.first.weight != 0, two)


def test_the_larger_weights_are_the_first_choice() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.4, 0.3, 0.2], [-0.4, 0.3, 0.1, -0.2]]))
    optimizer = SCL(connection_groups(layer, n_m="2:4"), lr=0.0, lam=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    expected = [[0.0, -0.4, 0.3, 0.0], [-0.4, 0.3, 0.0, 0.0]]
    assert torch.equal(layer.weight, torch.tensor(expected))
    assert optimizer.live_connections() == {"weight": 4}


def test_of_equals_the_first_are_chosen() -> None:
    layer = nn.Linear(8, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = SCL(connection_groups(layer, n_m="2:4"), lr=0.0, lam=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_the_guard_knows_that_a_block_has_no_more_than_n() -> None:
    """Asked for more than the pattern allows, it keeps what can be kept."""
    _, optimizer = _train("2:4", lam=30.0, min_connections=100)
    assert optimizer.live_connections() == {"0.weight": 64, "2.weight": 32}
    _, optimizer = _train("2:4", lam=30.0, min_connections=9)
    assert optimizer.live_connections() == {"0.weight": 9, "2.weight": 9}
    assert optimizer.held_layers == ["0.weight", "2.weight"]


def test_frozen_masks_keep_their_pattern() -> None:
    model, optimizer = _train("2:4")
    digest = optimizer.mask_hash()
    for group in optimizer.param_groups:
        group["mask_lr"] = 0.0
    for batch in mlp_batches(20):
        mse_step(model, optimizer, batch)
    assert optimizer.mask_hash() == digest


def test_the_hardware_format_takes_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("to_sparse_semi_structured needs CUDA: its kernels have no CPU counterpart")
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, bias=False, device="cuda", dtype=torch.float16)
    optimizer = SCL(connection_groups(layer, n_m="2:4"), lr=0.0, lam=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    assert torch.equal(sparse.to_dense(), layer.weight)


def test_the_pattern_is_the_one_of_the_hardware_format() -> None:
    """What to_sparse_semi_structured asks for, checked where its kernels cannot run."""
    model, _ = _train("2:4")
    for weight in (model.first.weight, model.second.weight):
        blocks = weight.detach().contiguous().view(-1, 4)
        assert int((blocks != 0).sum(1).max()) <= 2
