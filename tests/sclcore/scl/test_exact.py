"""Exactly so many connections, against sorting all of them; sharded, in `test_shards`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from tests.sclcore.nets import mlp, mlp_batches, train
from tests.sclcore.sharded import COARSE, MOVING, TWO_OF_FOUR, Case, batches, network


def trained(**options: Any) -> tuple[nn.Module, SCL]:
    model = mlp()
    optimizer = SCL(
        connection_groups(model), **{"lr": 0.05, "lam": 0.3, "mask_lr": 0.01, **options}
    )
    train(model, optimizer, mlp_batches(60))
    return model, optimizer


def sorted_out(variables: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` highest of all, equals in the order of tensors and elements, by a sort."""
    places = [
        (-float(v), i, j)
        for i, m in enumerate(variables.values())
        for j, v in enumerate(m.flatten())
    ]
    masks = {name: torch.zeros(m.numel(), dtype=torch.bool) for name, m in variables.items()}
    names = [*variables]
    for _, i, j in sorted(places)[:count]:
        masks[names[i]][j] = True
    return {name: mask.view(variables[name].shape) for name, mask in masks.items()}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.05])
def test_the_best_of_the_network_stay(share: float) -> None:
    model, optimizer = trained(min_connections=0)
    variables = {name: m.clone() for name, m in optimizer.mask_variables().items()}
    assert len(torch.cat([m.flatten() for m in variables.values()]).unique()) > 100
    optimizer.keep_share(share)
    expected = sorted_out(variables, round(share * 192))
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, expected[name])
        latent = optimizer.state[model.get_parameter(name)]["weight"]
        assert torch.equal(model.get_parameter(name).detach(), latent * mask)
    assert sum(optimizer.counted_connections().values()) == round(share * 192)


def test_of_equals_the_first_stay() -> None:
    _, optimizer = trained(lam=0.0, mask_lr=1e-12, min_connections=0)
    optimizer.set_masks({name: torch.ones_like(m) for name, m in optimizer.masks().items()})
    optimizer.keep_share(130 / 192)
    first, second = optimizer.masks().values()
    assert first.all() and int(second.sum()) == 2 and second.flatten()[:2].all()


def test_layers_keep_their_fewest_and_others_lack_them() -> None:
    model, optimizer = trained(min_connections=5)
    low = torch.full_like(model.get_parameter("2.weight"), -3.0)
    optimizer.set_masks({"2.weight": low + torch.arange(64).view(4, 16) / 100})
    optimizer.keep_share(0.1)
    assert optimizer.live_connections() == {"0.weight": round(19.2) - 5, "2.weight": 5}
    assert optimizer.masks()["2.weight"].flatten()[-5:].all(), "the best of those that were dead"


def test_weights_say_what_a_connection_counts() -> None:
    _, optimizer = trained(min_connections=0)
    weights = {"0.weight": 7.0, "2.weight": 2.0}
    variables = {name: m.clone() for name, m in optimizer.mask_variables().items()}
    optimizer.keep_share(0.3, weights)
    live, budget = optimizer.live_connections(), 0.3 * (7 * 128 + 2 * 64)
    spent = sum(weights[name] * count for name, count in live.items())
    assert budget - 7 < spent <= budget + 1, "the next one would cost more than is left"
    masks = optimizer.masks()
    worst = min(float(variables[name][masks[name]].min()) for name in masks if masks[name].any())
    best = max(float(variables[name][~masks[name]].max()) for name in masks)
    assert worst >= best


def test_units_stay_as_wholes() -> None:
    case = Case(steps=40)
    model = network(case)
    groups = connection_groups(model, granularity=COARSE)
    optimizer = SCL(groups, **{**MOVING, "min_connections": 0, "normalize": "network"})
    for batch in batches(case):
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = optimizer.connection_sizes()
    optimizer.keep_share(0.4)
    live = sum(optimizer.live_connections().values())
    largest = max(p.shape[1] for n, p in model.named_parameters() if n == "head.weight")
    assert abs(live - 0.4 * sum(sizes.values())) < max(largest, 9)
    head = optimizer.masks()["head.weight"]
    assert torch.equal(head.all(1), head.any(1))


def test_n_m_is_refused() -> None:
    model = network(Case())
    optimizer = SCL(connection_groups(model, n_m=TWO_OF_FOUR), **MOVING)
    with pytest.raises(ValueError, match="cannot meet a share under N:M"):
        optimizer.keep_share(0.5)
