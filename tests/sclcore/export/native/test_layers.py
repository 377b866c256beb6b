"""Each kind of layer gives what PyTorch gives, whatever its shape, density and instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from sclcore.export.native.file import save_network
from sclcore.export.native.lower import lower
from tests.sclcore.export.native.native import (
    BATCHES,
    KERNELS,
    assert_equal,
    kernels_here,
    load,
    network_of,
    noise,
    runtime_of,
    sparse,
)

# (input channels, output channels, further settings, height, width)
CONVOLUTIONS: list[tuple[int, int, dict[str, Any], int, int]] = [
    (5, 7, {"kernel_size": 1}, 9, 6),
    (6, 9, {"kernel_size": 3, "padding": 1}, 7, 7),
    (3, 8, {"kernel_size": 3}, 8, 5),
    (4, 6, {"kernel_size": 5, "padding": 2, "bias": False}, 14, 13),
    (3, 16, {"kernel_size": 7, "stride": 2, "padding": 3}, 33, 31),
    (4, 5, {"kernel_size": 1, "stride": 2}, 9, 9),
    (4, 5, {"kernel_size": 3, "stride": 2, "padding": 1}, 8, 11),
    (4, 5, {"kernel_size": 2, "stride": 2}, 6, 6),
    (4, 4, {"kernel_size": 4, "stride": 4}, 16, 12),
    (4, 5, {"kernel_size": 3, "stride": (1, 2), "padding": (0, 1)}, 7, 9),
    (8, 8, {"kernel_size": 3, "padding": 1, "groups": 8}, 20, 17),
    (8, 16, {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 8}, 15, 14),
    (8, 12, {"kernel_size": 3, "padding": 1, "groups": 4}, 6, 6),
    (4, 6, {"kernel_size": 3, "padding": 2, "dilation": 2}, 11, 10),
    (4, 6, {"kernel_size": 3, "padding": 4, "stride": 3, "dilation": 2}, 11, 10),
    (4, 6, {"kernel_size": 3, "padding": "same", "dilation": 3}, 9, 9),
    (3, 4, {"kernel_size": (1, 5), "padding": (0, 2)}, 5, 40),
]


@pytest.mark.parametrize("density", [0.15, 1.0])
def test_convolutions(density: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.scln"
    for number, (inputs, outputs, settings, *size) in enumerate(CONVOLUTIONS):
        layer = nn.Conv2d(inputs, outputs, **settings)
        sparse(layer, density, number)
        save_network(network_of(layer, (inputs, *size)), path, {})
        for kernels in kernels_here():
            monkeypatch.setenv("SCL_KERNELS", kernels)
            runtime = load(path)
            assert runtime.kernels == kernels
            for batch in BATCHES:
                assert_equal(layer, runtime, noise(batch, (inputs, *size)))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_linear_layers(density: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 7, 37), nn.Tanh(), nn.Linear(37, 11))
    sparse(model, density)
    path = tmp_path / "model.scln"
    save_network(lower(model, torch.zeros(2, 3, 5, 7)), path, {})
    for kernels in kernels_here():
        monkeypatch.setenv("SCL_KERNELS", kernels)
        for batch in (*BATCHES, 64, 129):
            assert_equal(model, load(path), noise(batch, (3, 5, 7)))


class OnePixel(nn.Module):
    """Convolutions that give one pixel, or get one."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(6, 10, 5)
        self.corner = nn.Conv2d(10, 8, 3, 2, 1, groups=2)
        self.wider = nn.Conv2d(8, 4, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wider(self.corner(self.whole(x).relu()).relu())


class Ends(nn.Module):
    """Every activation, after what can end in one and after what cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.functions = [f.relu, f.relu6, f.silu, torch.sigmoid, torch.tanh]
        self.functions += [f.hardswish, f.hardsigmoid, f.gelu, lambda x: x.clamp(-0.5, 0.7)]
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in self.functions)

    def forward(self, x: Tensor) -> Tensor:
        for function, layer in zip(self.functions, self.layers, strict=True):
            x = function(layer(x)) + function(f.max_pool2d(x, 3, 1, 1))
        return x


class Sums(nn.Module):
    """Sums, products with numbers and gates, of what others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.three, self.gate = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        y = (one + two).relu()
        y = y + (self.three(y) + one)
        y = (y + y) * 0.5 + 2
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return (self.three(y) / 2 + y).relu().flatten(1)


class Pools(nn.Module):
    """Pools of all kinds, and pixels taken and set among zeros as CIFAR's ResNet does."""

    def forward(self, x: Tensor) -> Tensor:
        x = f.max_pool2d(x - 3, 3, 2, 1, ceil_mode=True)
        x = f.avg_pool2d(x, 3, 1, 1)
        x = f.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        x = f.pad(f.adaptive_avg_pool2d(x, (2, 3)), (1, 2, 1, 0))
        return f.max_pool2d(x, (2, 3), (1, 2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Ends(), (4, 6, 9)),
        (OnePixel(), (6, 5, 5)),
        (Sums(), (3, 5, 8)),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Pools()), (2, 15, 23)),
        (nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.ReLU()), (2, 7, 5)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)), (3, 6, 6)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)), (5, 9, 11)),
    ],
    ids=["activations", "one_pixel", "sums", "pools", "group_norm", "batch_norm", "mean"],
)
def test_what_lies_between(
    model: nn.Module, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(model, 0.4)
    path = tmp_path / "model.scln"
    save_network(lower(model, torch.zeros(2, *shape)), path, {})
    for kernels in kernels_here():
        monkeypatch.setenv("SCL_KERNELS", kernels)
        for batch in BATCHES:
            assert_equal(model, load(path), noise(batch, shape))


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_not_finite_goes_through_as_in_pytorch(
    tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in an image reaches the outputs that it reaches there, and no other."""
    if kernels not in kernels_here():
        pytest.skip(f"this processor has no {kernels}")
    monkeypatch.setenv("SCL_KERNELS", kernels)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU6(), nn.Conv2d(3, 4, 1)
    )
    runtime = runtime_of(sparse(model, 1.0), (2, 8, 8), tmp_path / "model.scln")
    for batch in (1, 20):
        images = noise(batch, (2, 8, 8))
        images[-1, 0, 2, 3] = torch.nan
        images[-1, 1, 7, 7] = torch.inf
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(runtime(images.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert expected.isnan().any() and expected.isfinite().any()
