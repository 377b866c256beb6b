"""Pruning from scratch: gates on fixed random weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from launcher.models.small import SmallConvNet
from sclcore.driver.budget_search import keep_largest
from sclcore.driver.build import optimizer_of
from sclcore.driver.gates import gated_layers, live
from sclcore.driver.optimizer import Driver
from sclcore.export.removal import remove_dead_features
from sclcore.methods.from_scratch import FromScratch
from sclcore.network.connections import weight_uses
from tests.sclcore.driver.gated_net import GATES, Factors, gated_batches, gated_net
from tests.sclcore.methods.gated_training import gated_training

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
EXAMPLE = torch.zeros(1, 2, 4, 4)


def from_scratch(model: nn.Module, **options: Any) -> Driver:
    budget = {} if "macs" in options else {"density": 0.5}
    options = {"mean_gate": 0.15, "gate_lr": 0.1, "lam": 1.0, "search_until": 0.99} | options
    options = budget | options
    optimizer = optimizer_of(FromScratch(**options), model, EXAMPLE, SGD)
    assert isinstance(optimizer, Driver)
    optimizer.write_weights()
    return optimizer


def test_it_is_the_papers_objective() -> None:
    """Gates as factors of outputs, their gradient by autograd, torch's Adam, clamped."""
    model, reference, batches = gated_net(), gated_net(), gated_batches(60)
    optimizer = from_scratch(model)
    gates = {
        name: torch.ones(reference.get_parameter(name).shape[0], dtype=torch.float64)
        for name in GATES
    }
    adam = torch.optim.Adam([g.requires_grad_() for g in gates.values()], lr=0.1, fused=True)
    gated_training(model, optimizer, batches)
    for images, labels in batches:
        adam.zero_grad()
        with Factors(reference, gates):
            loss = nn.functional.cross_entropy(reference(images), labels)
        every = torch.cat([*gates.values()])
        (loss + 1.0 * (every.abs().mean() - 0.15) ** 2).backward()
        adam.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0, 1)
    found = {layer.name: layer.state["gate"] for layer in gated_layers(optimizer)}
    for name, gate in gates.items():
        # In double, with the same sums in another order.
        torch.testing.assert_close(found[name], gate.detach(), rtol=0, atol=1e-9)
    assert any((gate == 0).any() for gate in found.values())
    assert any((gate > 0).any() for gate in found.values())


def test_weights_stay_as_they_were_drawn() -> None:
    model, first = gated_net(), gated_net()
    optimizer = from_scratch(model)
    gated_training(model, optimizer, gated_batches(60))
    masks = optimizer.masks()
    shut = ~masks["conv.weight"].flatten(1).any(1)
    assert shut.any()
    assert not model.norm.weight[shut].any()
    expected = torch.where(masks["conv.weight"], first.conv.weight, 0.0)
    assert torch.equal(model.conv.weight, expected)
    assert torch.equal(model.head.bias, first.head.bias)


def test_the_features_of_the_best_epoch_are_trained_from_other_weights() -> None:
    """The largest gates of the epoch that did best with few enough of them, within the budget."""
    model, batches = gated_net(), gated_batches(40)
    first = gated_net()
    optimizer = from_scratch(model, search_until=0.5, density=0.5, mean_gate=0.4)
    for state in (layer.state for layer in gated_layers(optimizer)):
        assert "chosen" not in state
    for best, top1 in ((0, 0.9), (1, 0.5), (2, 0.7), (3, 0.6)):
        for layer in gated_layers(optimizer):
            gate = layer.filled(0.5 if best == 0 else 0.0)
            gate[best] = 1.0
            layer.state["gate"] = gate
        optimizer.after_epoch({"val/top1": top1})
    assert gated_layers(optimizer)[0].state["kept_top1"] == 0.7
    gated_training(model, optimizer, batches, range(20, 21))
    for layer in gated_layers(optimizer):
        assert layer.state["chosen"][2] == 1
    sizes, live = optimizer.connection_sizes(), optimizer.live_connections()
    assert sum(live.values()) <= 0.5 * sum(sizes.values())
    masks = optimizer.mask_hash()
    gated_training(model, optimizer, batches, range(21, 40))
    assert optimizer.mask_hash() == masks
    for name, mask in optimizer.masks().items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    for name in ("head.weight", "head.bias", "conv.weight"):
        assert not torch.equal(model.get_parameter(name), first.get_parameter(name))


def test_new_weights_are_the_old_ones_in_another_order_with_the_variance_of_fewer_inputs() -> None:
    model, first = gated_net(), gated_net()
    optimizer = from_scratch(model, search_until=0.5, density=0.4)
    for group in optimizer.param_groups:
        group["progress"] = 0.5
    optimizer.before_update()
    latent = {each.name: each.state["weight"] for each in optimizer.tensors}
    kept = {layer.name: layer.state["chosen"] for layer in gated_layers(optimizer)}
    read = {"conv.weight": 1.0, "head.weight": float(kept["hidden.weight"].mean())}
    read["hidden.weight"] = float(kept["deep.weight"].mean())
    for name, share in read.items():
        before = first.get_parameter(name).detach().flatten()
        after = latent[name].flatten() * math.sqrt(share)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(before.sort().values, after.sort().values)


@pytest.mark.parametrize("key", ["density", "macs"])
def test_the_budget_is_met_by_the_most_features(key: str) -> None:
    """One more of the largest gates would exceed it; the convolutions have most of the MACs."""
    optimizer = from_scratch(gated_net(), search_until=0.5, **{key: 0.5})
    generator = torch.Generator().manual_seed(0)
    for layer in gated_layers(optimizer):
        layer.state["gate"].uniform_(generator=generator)
    gates = {layer.name: layer.state["gate"] for layer in gated_layers(optimizer)}
    for group in optimizer.param_groups:
        group["progress"] = 0.5
    optimizer.before_update()
    uses = weight_uses(gated_net(), EXAMPLE) if key == "macs" else {}

    def cost(chosen: dict[str, torch.Tensor]) -> float:
        masks = dict(zip(optimizer.connection_sizes(), live(optimizer, chosen), strict=True))
        return sum(uses.get(name, 1.0) * int(mask.sum()) for name, mask in masks.items())

    chosen = {layer.name: layer.state["chosen"] for layer in gated_layers(optimizer)}
    count = sum(int(gate.sum()) for gate in chosen.values())
    whole = cost(keep_largest(gates, 13))
    assert cost(chosen) <= 0.5 * whole < cost(keep_largest(gates, count + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 1.0}, "density\n.*less than 1"),
        ({"density": None}, "needs density or macs, one of them"),
        ({"macs": 0.5, "density": 0.5}, "needs density or macs, one of them"),
        ({"lam": -1.0}, "lam\n.*greater than or equal to 0"),
        ({"density": 0.05}, r"density 0.05 is less than one feature in each .* \(0\.142\)"),
        ({"exclude": ["conv", "deep", "hidden"]}, "no units to gate"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_scratch(gated_net(), **options)


def test_the_training_goes_through_a_schedule_of_its_own() -> None:
    method = FromScratch(density=0.5, search_until=0.2)
    assert [method.lr_progress(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.5, 1.0])


def test_the_small_network_is_what_is_left_when_dead_features_are_removed() -> None:
    torch.manual_seed(0)
    model, images = SmallConvNet(width=8), torch.randn(16, 1, 8, 8)
    method = FromScratch(density=0.3, search_until=0.5)
    optimizer = optimizer_of(method, model, images[:1], SGD)
    assert isinstance(optimizer, Driver)
    gated_training(model, optimizer, [(images, torch.arange(16) % 10)] * 20)
    smaller, _ = remove_dead_features(model, images[:1])
    for layer in gated_layers(optimizer):
        left = smaller.get_parameter(layer.name).shape[0]
        assert left == int(layer.state["chosen"].sum()) < layer.units["count"] or left == 8
    sizes = sum(p.numel() for n, p in smaller.named_parameters() if n in optimizer.masks())
    assert sizes == sum(optimizer.live_connections().values())
    # Sums in another order, in float32.
    torch.testing.assert_close(smaller(images), model.eval()(images), rtol=1e-4, atol=1e-4)
