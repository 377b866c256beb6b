"""No more than a share of the connections, after each update, against sorting all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sclcore import SCL, connection_groups
from sclcore.kernels.find import find_kernel
from sclcore.scl import limit
from tests.sclcore.nets import mlp, mlp_batches, train
from tests.sclcore.sharded import MOVING, TWO_OF_FOUR, Case, network

CONNECTIONS = 192
SETTINGS = {"lr": 0.05, "lam": 0.0, "mask_lr": 0.01, "min_connections": 0}


def limited(share: float | None, **options: float) -> tuple[nn.Module, SCL]:
    """An MLP after 60 updates of which the last 40 have a limit.

    Without λ: what its gradients would kill alone is less than the limit asks for.
    """
    model = mlp()
    optimizer = SCL(connection_groups(model), **{**SETTINGS, **options})
    train(model, optimizer, mlp_batches(20))
    optimizer.limit_share(share)
    train(model, optimizer, mlp_batches(60)[20:])
    return model, optimizer


@pytest.mark.parametrize("share", [0.8, 0.3, 0.05])
def test_never_more_live_than_may(share: float) -> None:
    model, optimizer = limited(None)
    optimizer.limit_share(share)
    allowed, at_the_limit = round(share * CONNECTIONS), 0
    for batch in mlp_batches(90)[60:]:
        train(model, optimizer, [batch])
        live = sum(optimizer.live_connections().values())
        # Where some have died of their own gradients, fewer are left.
        assert live == allowed if optimizer.lowered else live <= allowed
        at_the_limit += live == allowed
        assert live == sum(optimizer.counted_connections().values())
        for name, mask in optimizer.masks().items():
            latent = optimizer.state[model.get_parameter(name)]["weight"]
            assert torch.equal(model.get_parameter(name).detach(), latent * mask)
    assert at_the_limit >= 1


def test_all_are_lowered_together_and_as_little_as_can_be() -> None:
    """One step beside the same without limit or restart: m less one number, the next one's m."""
    model, optimizer = limited(None, mask_restart=0.0)
    twin, free = copy.deepcopy((model, optimizer))
    optimizer.limit_share(0.3)
    batch = mlp_batches(61)[60:]
    train(model, optimizer, batch)
    train(twin, free, batch)
    lowered = optimizer.lowered
    assert lowered and lowered > 0
    before = torch.cat([m.flatten() for m in free.mask_variables().values()])
    after = torch.cat([m.flatten() for m in optimizer.mask_variables().values()])
    assert torch.equal(after, before - lowered)
    highest = before.sort(descending=True).values
    assert float(highest[round(0.3 * CONNECTIONS)]) == lowered, "the best that may not live"


def test_what_rises_begins_anew_only_where_it_displaces_another() -> None:
    model, optimizer = limited(0.3)
    seen = 0
    for batch in mlp_batches(120)[60:]:
        was = optimizer.masks()
        train(model, optimizer, [batch])
        variables = optimizer.mask_variables()
        for name, mask in optimizer.masks().items():
            risen = mask & ~was[name]
            momentum = optimizer.state[model.get_parameter(name)]["mask_momentum_buffer"]
            assert (variables[name][risen] == 1.0).all() and (momentum[risen] == 0.0).all()
            seen += int(risen.sum())
    assert seen > 20
    flips = optimizer.take_flips().values()
    assert sum(revived for _, revived in flips) >= seen


def test_where_fewer_live_nothing_is_lowered() -> None:
    model = mlp()
    other = SCL(connection_groups(model), **{**SETTINGS, "mask_lr": 1e-9})
    train(model, other, mlp_batches(1))
    other.limit_share(1.0)
    train(model, other, mlp_batches(1))
    assert other.lowered == 0.0
    assert sum(other.live_connections().values()) == CONNECTIONS


def test_weights_say_what_a_connection_counts() -> None:
    model, optimizer = limited(None)
    weights, allowed, held = {"0.weight": 7.0, "2.weight": 2.0}, 0.3 * (7 * 128 + 2 * 64) + 1, 0
    optimizer.limit_share(0.3, weights)
    for batch in mlp_batches(40):
        train(model, optimizer, [batch])
        spent = sum(weights[name] * count for name, count in optimizer.live_connections().items())
        assert allowed - 7 < spent <= allowed if optimizer.lowered else spent <= allowed
        held += bool(optimizer.lowered)
    assert held >= 1


def test_bfloat16_holds_the_limit_to_within_its_rounding() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), **{**SETTINGS, "mask_dtype": "bfloat16"})
    optimizer.limit_share(0.3)
    train(model, optimizer, mlp_batches(100))
    live = sum(optimizer.live_connections().values())
    # Of equals, of which bfloat16 has many, all fall together.
    assert 0.5 * 0.3 * CONNECTIONS < live <= round(0.3 * CONNECTIONS)


def test_frozen_masks_have_no_limit_and_n_m_is_refused() -> None:
    model, optimizer = limited(0.3)
    for group in optimizer.param_groups:
        group["mask_lr"] = 0.0
    before = optimizer.live_connections()
    optimizer.limit_share(0.1)
    train(model, optimizer, mlp_batches(3))
    assert optimizer.live_connections() == before
    blocks = SCL(connection_groups(network(Case()), n_m=TWO_OF_FOUR), **MOVING)
    with pytest.raises(ValueError, match="cannot hold a share under N:M"):
        blocks.limit_share(0.5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_fused_walks_are_the_reference(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they look first and how they lower, bit for bit, on tensors shared out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(500, 700), nn.ReLU(), nn.Linear(700, 90))
        optimizer = SCL(connection_groups(model), **{**SETTINGS, "mask_restart": 0.5})
        twin, other = copy.deepcopy((model, optimizer))
        optimizer.limit_share(0.3)
        other.limit_share(0.3)
        fused = find_kernel(torch.device("cpu"))
        looked_near = 0
        for step in range(6):
            images, labels = torch.randn(8, 500), torch.randint(90, (8,))
            for net, rule, kernel in ((model, optimizer, fused), (twin, other, None)):
                monkeypatch.setattr(limit, "find_kernel", lambda _, kernel=kernel: kernel)
                rule.zero_grad()
                nn.functional.cross_entropy(net(images), labels).backward()
                rule.step()
            assert optimizer.lowered == other.lowered
            looked_near += step > 0 and bool(optimizer.lowered)
            assert optimizer.counted_connections() == other.counted_connections()
            for (name, mine), theirs in zip(
                model.named_parameters(), twin.parameters(), strict=True
            ):
                assert torch.equal(mine, theirs), name
                for key, value in optimizer.state[mine].items():
                    assert torch.equal(value, other.state[theirs][key]), (name, key)
        flips = optimizer.take_flips()
        assert flips == other.take_flips() and sum(revived for _, revived in flips.values()) > 100
        assert looked_near >= 2
    finally:
        torch.set_num_threads(before)
