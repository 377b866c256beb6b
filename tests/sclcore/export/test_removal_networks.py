"""On whole networks outputs stay equal, nothing dead is left without a reason, and the result is
a network that others can export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sclcore.export.removal import RemovalReport, remove_dead_features
from sclcore.export.removal.proof import COUPLED, PADDED
from tests.sclcore.pruned import NETWORKS, RandomNet, network

# Rounding in float64 is 10⁻¹⁶ per operation; 10² layers with sums of 10³ terms stay below 10⁻¹²
# of the largest output. In float32 the same argument gives 10⁻⁴.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def outputs_agree(model: nn.Module, smaller: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = model(x), smaller(x)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[x.dtype] * scale)


def depends_on_its_input(model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        output = model(x)
    return bool(output.std(0).max() > 1e-3 * output.abs().max())


# What must be found in each, and what must be left alone.
EXPECTED_REASONS = {
    "resnet18": {COUPLED, PADDED},
    "resnet50": {COUPLED, PADDED},
    "small_convnet": {PADDED},
    "vgg": {PADDED},
    "mobilenetv2_100": {PADDED},
    "efficientnet_b0": {PADDED},
    "vit_tiny_patch16_224": {"layer_norm takes its statistics over it"},
    "convnext_atto": {"layer_norm takes its statistics over it"},
    "regnety_002": {COUPLED},
    "densenet121": {PADDED},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_known_networks_stay_equal(name: str) -> None:
    model = network(name, seed=0)
    x = torch.randn(3, 3, 32, 32)
    assert depends_on_its_input(model, x)
    smaller, report = remove_dead_features(model, torch.zeros(1, 3, 32, 32))
    outputs_agree(model, smaller, x)
    assert report.problem == ""
    assert report.difference < TOLERANCE[torch.float64]
    assert type(smaller) is type(model)
    assert report.features_after < report.features_before
    assert report.macs_after < report.macs_before
    assert report.parameters_after == sum(p.numel() for p in smaller.parameters())
    assert EXPECTED_REASONS[name] <= set(report.left)


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(10, 25))]
)
def test_of_a_random_network_the_dead_features_go_and_only_those(seed: int) -> None:
    model = living_net(seed)
    smaller, report = remove_dead_features(model, torch.zeros(1, 3, 14, 14))
    for shape in ((2, 3, 14, 14), (3, 3, 17, 16)):
        outputs_agree(model, smaller, torch.randn(shape, dtype=torch.float64))
    _nothing_dead_remains(smaller, report)


def living_net(seed: int) -> RandomNet:
    """The first of its kind that is not dead as a whole."""
    for attempt in range(100):
        model = RandomNet(100 * seed + attempt).double().eval()
        if depends_on_its_input(model, torch.randn(4, 3, 14, 14, dtype=torch.float64)):
            return model
    raise AssertionError(seed)


def _nothing_dead_remains(model: nn.Module, report: RemovalReport) -> None:
    """By another way than the proof's: values over a batch, and the gradient of the outputs."""
    layers = {f"{n}.weight": m for n, m in model.named_modules() if hasattr(m, "weight")}
    seen: dict[str, Tensor] = {}

    def remember(name: str):
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = output

        return hook

    handles = [m.register_forward_hook(remember(n)) for n, m in layers.items()]
    x = torch.randn(16, 3, 14, 14, dtype=torch.float64)
    weights = torch.randn(4, dtype=torch.float64)
    (model(x) @ weights).tanh().sum().backward()
    for handle in handles:
        handle.remove()
    for layer in report.layers:
        output, gradient = seen[layer.layer], seen[layer.layer].grad
        assert gradient is not None
        dims = [d for d in range(output.ndim) if d != 1]
        spread = output.detach().std(0, keepdim=True).amax(dims)
        dead = (spread < 1e-12) | (gradient.abs().amax(dims) == 0)
        assert int(dead.sum()) == sum(layer.left.values()), layer


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", pytest.param("resnet50", marks=pytest.mark.long)]
)
def test_others_can_export_the_result(name: str, tmp_path: Path) -> None:
    import onnxruntime

    smaller, _ = remove_dead_features(network(name, seed=1), torch.zeros(1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = smaller(x)
    torch.export.save(torch.export.export(smaller, (x,)), tmp_path / "model.pt2")
    reopened = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(reopened(x), expected)
    torch.onnx.export(smaller, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    scale = float(expected.abs().max())
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4 * scale)
