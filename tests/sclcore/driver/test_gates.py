"""Gated parameters against gates that multiply the outputs of modules."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from launcher.models.build import create_model
from launcher.recipe.model import ModelConfig
from sclcore.driver.gates import (
    GatedMethod,
    adam,
    gate_gradients,
    gated_layers,
    live,
    move_latents,
    per_layer,
    write_gated,
)
from sclcore.driver.optimizer import Driver
from tests.sclcore.driver.gated_net import GATES, Factors, GatedNet, gated_batches, gated_net

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"lr": 0.01, "weight_rule": "adamw", "weight_decay": 0.5}


class Given(GatedMethod, frozen=True):
    """Gates that somebody sets."""

    name: Literal["given"] = "given"

    def begin(self, layers: list[Any]) -> None:
        for layer in layers:
            layer.state["gate"] = layer.filled(1.0)

    def shown(self, net: Any) -> dict[str, Tensor]:
        return {layer.name: layer.state["gate"] for layer in gated_layers(net)}


def driver(model: nn.Module, example: Tensor, **weights: Any) -> Driver:
    method = Given()
    optimizer = Driver(method, method.groups(model, example), **(weights or SGD))
    optimizer.write_weights()
    return optimizer


def set_gates(optimizer: Driver, share: float, seed: int = 0) -> dict[str, Tensor]:
    """Random gates, of which `share` are shut and none is 1."""
    generator = torch.Generator().manual_seed(seed)
    for layer in gated_layers(optimizer):
        gate = layer.state["gate"]
        gate.copy_(torch.rand(gate.shape, generator=generator, dtype=gate.dtype) + 0.5)
        gate[torch.rand(gate.shape, generator=generator) < share] = 0.0
    return dict(optimizer.method.shown(optimizer))  # type: ignore[attr-defined]


@pytest.mark.parametrize("training", [True, False])
def test_a_gated_network_is_one_whose_outputs_are_multiplied(training: bool) -> None:
    model, [(images, _)] = gated_net(), gated_batches(1)
    reference = gated_net()
    optimizer = driver(model, images[:1])
    gates = set_gates(optimizer, share=0.3)
    assert any((gate == 0).any() for gate in gates.values())
    with Factors(reference, gates):
        expected = reference.train(training)(images)
    with torch.no_grad():
        write_gated(optimizer, gates)
    # In double; the two differ by where a product is rounded.
    torch.testing.assert_close(model.train(training)(images), expected, rtol=0, atol=1e-12)
    if training:
        return
    optimizer.write_weights()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [SGD, ADAMW])
def test_weights_and_gates_have_the_gradients_of_autograd(weights: dict[str, Any]) -> None:
    """Ten updates with other gates in each, against factors of outputs and torch's optimizers."""
    model, reference, batches = gated_net(), gated_net(), gated_batches(10)
    optimizer = driver(model, batches[0][0][:1], **weights)
    plain = {key: value for key, value in weights.items() if key != "weight_rule"}
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    others = [p for p in reference.parameters() if p.ndim > 1]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    adamw = "weight_rule" in weights
    rule = (
        torch.optim.AdamW(groups, **plain, fused=True)
        if adamw
        else torch.optim.SGD(groups, **plain)
    )
    for seed, (images, labels) in enumerate(batches):
        gates = {n: g.clone().requires_grad_() for n, g in set_gates(optimizer, 0.3, seed).items()}
        keep = {name: torch.full_like(gate, 0.25).detach() for name, gate in gates.items()}
        rule.zero_grad()
        with Factors(reference, gates):
            nn.functional.cross_entropy(reference(images), labels).backward()
        before = {name: p.detach().clone() for name, p in reference.named_parameters()}
        for name in GATES:
            weight = reference.get_parameter(name)
            assert weight.grad is not None
            if not adamw:
                weight.grad -= 0.75 * weights["weight_decay"] * weight.detach()
        rule.step()
        if adamw:
            for name in GATES:
                spared = 0.75 * weights["weight_decay"] * weights["lr"] * before[name]
                reference.get_parameter(name).data += spared

        detached = {name: gate.detach() for name, gate in gates.items()}
        with torch.no_grad():
            write_gated(optimizer, detached)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        found = gate_gradients(optimizer)
        for name, gate in gates.items():
            assert gate.grad is not None
            torch.testing.assert_close(found[name], gate.grad, rtol=0, atol=1e-12)
        with torch.no_grad():
            move_latents(optimizer, detached, keep)
        # As the driver counts them when a whole update is made.
        optimizer.settings["updates"] += 1
        for name, p in model.named_parameters():
            expected = reference.get_parameter(name)
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("small_convnet", 8, {}),
        ("small_convnet", 8, {"norm": "group"}),
        ("lenet5_caffe", 28, {}),
        ("cifar_resnet20", 16, {}),
        ("mobilenetv3_small_050", 32, {}),
        (
            "vit_tiny_patch16_224",
            8,
            {"img_size": 8, "patch_size": 2, "embed_dim": 25, "depth": 2, "num_heads": 5},
        ),
    ],
)
def test_what_masks_call_dead_is_zero_and_changes_nothing(
    name: str, size: int, kwargs: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=name, kwargs=kwargs), num_classes=5, in_chans=1).eval()
    images = torch.randn(2, 1, size, size)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.2, 1.0)
    optimizer = driver(model, images[:1])
    gates = set_gates(optimizer, share=0.4)
    with torch.no_grad():
        write_gated(optimizer, gates)
        gated = model(images)
        optimizer.write_weights()
        shown = model(images)
    # Sums in another order: what is left out was 0.
    assert float(gated.std()) > 0
    torch.testing.assert_close(shown, gated, rtol=1e-4, atol=1e-4 * float(gated.abs().max()))
    for tensor, mask in optimizer.masks().items():
        assert torch.equal(model.get_parameter(tensor) != 0, mask), tensor


def test_columns_of_a_grouped_convolution_are_those_of_its_own_inputs() -> None:
    optimizer = driver(gated_net(), torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    gates = {name: torch.ones(5 if "hidden" in name else 4) for name in GATES}
    gates["conv.weight"][2] = 0.0
    dead = {n: ~m for n, m in zip(optimizer.masks(), live(optimizer, gates), strict=True)}
    assert dead["conv.weight"].nonzero()[:, 0].unique().tolist() == [2]
    # Inputs 2 and 3 belong to the second group, whose outputs are 2 and 3.
    assert dead["deep.weight"].nonzero()[:, :2].unique(dim=0).tolist() == [[2, 0], [3, 0]]


def test_what_others_write_becomes_the_latent_value() -> None:
    """Also into batch norm's parameters; what is shut stays 0, and is counted."""
    model, [(images, _labels)] = gated_net(), gated_batches(1)
    optimizer = driver(model, images[:1], lr=0.0)
    gates = set_gates(optimizer, share=0.0)
    optimizer.method.shown(optimizer)["conv.weight"][1] = 0.0  # type: ignore[attr-defined]
    optimizer.write_weights()
    other = gated_net(seed=1)
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
    # The row of 18 weights, γ and β, and the column that two rows of 9 have of it.
    with pytest.warns(UserWarning, match="conv.weight and 3 more tensors .* 38 of them belong"):
        optimizer.before_update()
    latent = {
        each.name: each.state["weight"] for each in [*optimizer.tensors, *optimizer.others]
        if "weight" in each.state
    }  # fmt: skip
    expected = other.norm.bias / gates["conv.weight"]
    assert torch.allclose(latent["norm.bias"][[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.allclose(latent["conv.weight"][0], other.conv.weight[0])
    assert not model.norm.bias[1]
    assert set(latent) == {*GATES, "head.weight", "norm.weight", "norm.bias"} | {
        "deep.bias",
        "hidden.bias",
    }


def test_adam_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = nn.Parameter(torch.zeros(3))
    rule, state = torch.optim.Adam([expected], lr=0.1, fused=True), {"phi": torch.zeros(3)}
    for _ in range(5):
        expected.grad = torch.randn(3, generator=generator)
        rule.step()
        adam(state, "phi", expected.grad, 0.1)
    # Fused and not: another order of the same few operations in float32.
    torch.testing.assert_close(state["phi"], expected.detach(), rtol=1e-5, atol=0)
    assert state["phi_updates"] == 5


def test_an_option_for_each_layer() -> None:
    names = ["a.conv1.weight", "a.conv2.weight"]
    assert per_layer("lam", 2.0, names) == [2.0, 2.0]
    assert per_layer("lam", {"*": 1.0, "a.conv2": 3.0}, names) == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"lam has no value for the layer a\.conv2: add it, or"):
        per_layer("lam", {"a.conv1": 1.0}, names)
    with pytest.raises(ValueError, match="lam pattern 'b' matches no layer with gates"):
        per_layer("lam", {"*": 1.0, "b": 2.0}, names)


def test_the_network_of_these_tests_has_gates_of_every_kind() -> None:
    layers = gated_layers(driver(GatedNet(), torch.zeros(1, 2, 4, 4)))
    assert [layer.name for layer in layers] == [*GATES]
    assert [layer.units["on_rows"] for layer in layers] == [False, True, True]
