"""Whole networks: equal outputs whatever the batch and the threads, files as small as promised."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.models.vgg import VGG
from torch import nn

from launcher.models.cifar import CifarResNet, CifarVGG, WideResNet
from launcher.models.small import LeNet5Caffe, LeNet300100, SmallConvNet
from sclcore.export import ExportError, save_compact
from sclcore.export.native import save_native
from sclcore.export.native.lower import lower
from tests.sclcore.export.native.native import BATCHES, assert_equal, noise, runtime_of, sparse, vit

Build = Callable[[], nn.Module]
LONG = pytest.mark.long


def _timm(name: str) -> Build:
    return lambda: timm.create_model(name, num_classes=7)


def _vgg() -> nn.Module:
    return VGG([8, "M", 16, "M", 16, 16, "M"], num_classes=7, mlp_ratio=0.02)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (LeNet5Caffe, (1, 28, 28)),
        (LeNet300100, (1, 28, 28)),
        (lambda: CifarResNet(8), (3, 31, 29)),
        (lambda: CifarResNet(20), (3, 32, 32)),
        (lambda: vit(init_values=0.5), (3, 24, 24)),
        pytest.param(CifarVGG, (3, 32, 32), marks=LONG),
        pytest.param(lambda: WideResNet(16, 2), (3, 32, 32), marks=LONG),
        pytest.param(_timm("resnet18"), (3, 65, 47), marks=LONG),
        pytest.param(_timm("resnet50"), (3, 64, 64), marks=LONG),
        pytest.param(_timm("resnet50"), (3, 224, 224), marks=LONG),
        pytest.param(_vgg, (3, 56, 56), marks=LONG),
        pytest.param(_timm("mobilenetv2_100"), (3, 77, 64), marks=LONG),
        pytest.param(_timm("efficientnet_b0"), (3, 64, 64), marks=LONG),
        pytest.param(_timm("regnety_002"), (3, 64, 64), marks=LONG),
        pytest.param(_timm("mobilenetv3_small_100"), (3, 64, 64), marks=LONG),
        pytest.param(_timm("vit_small_patch16_224"), (3, 224, 224), marks=LONG),
        pytest.param(_timm("deit3_small_patch16_224"), (3, 224, 224), marks=LONG),
        pytest.param(lambda: vit(global_pool="avg", class_token=False), (3, 24, 24), marks=LONG),
    ],
)
def test_outputs(build: Build, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = sparse(build(), 0.2)
    runtime = runtime_of(model, shape, tmp_path / "model.scln")
    for batch in BATCHES if shape[-1] < 100 else (1, 2):
        assert_equal(model, runtime, noise(batch, shape), threads=1 + batch % 2)


def test_digits(tmp_path: Path) -> None:
    """Real images; the whole of the library's way, as the export goes it."""
    pixels = load_digits(return_X_y=True)[0].reshape(-1, 1, 8, 8).astype(np.float32) / 16
    images = torch.from_numpy((pixels - pixels.mean()) / pixels.std())
    model = sparse(SmallConvNet(width=16), 0.1)
    compared = save_native(model, tmp_path, torch.zeros(2, 1, 8, 8), {"model": "small_convnet"})
    assert 0 <= compared.difference < 1e-5 * compared.scale
    runtime = runtime_of(model, (1, 8, 8), tmp_path / "again.scln")
    assert_equal(model, runtime, images)
    assert {"scl.c", "libscl.so", "libscl.a"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ExportError, match=r"model\.scln gives other outputs than the model"):
        _with_another_bias(model, tmp_path)


def _with_another_bias(model: nn.Module, folder: Path) -> None:
    """What the check is for: a file whose network is not the model that it was written of."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.bias, self.calls = model, nn.Parameter(torch.zeros(10)), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Traced without it, then run with it.
            return self.inner(x) + (0.0 if torch.compiler.is_exporting() else 0.05)

    save_native(Swapped().eval(), folder, torch.zeros(2, 1, 8, 8))


def test_any_number_of_threads_may_call_it(tmp_path: Path) -> None:
    """Each with its own images, batch and threads; and always the same bits."""
    model = sparse(CifarResNet(8), 0.3)
    runtime = runtime_of(model, (3, 16, 16), tmp_path / "model.scln")
    given = [noise(batch, (3, 16, 16)).numpy() for batch in (1, 3, 19, 40)]
    alone = [runtime(images) for images in given]

    def call(number: int) -> bool:
        images, threads = given[number % 4], 1 + number % 3
        return np.array_equal(runtime(images, threads), alone[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(60)))


def test_a_forked_process_has_threads_of_its_own(tmp_path: Path) -> None:
    runtime = runtime_of(sparse(CifarResNet(8), 0.3), (3, 8, 8), tmp_path / "model.scln")
    images = noise(2, (3, 8, 8)).numpy()
    expected = runtime(images, threads=3)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(runtime(images, threads=3), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_file_is_no_larger_than_the_compact_one(density: float, tmp_path: Path) -> None:
    model = sparse(CifarResNet(20), density)
    runtime_of(model, (3, 32, 32), tmp_path / "model.scln")
    save_compact({k: v + 0 for k, v in model.state_dict().items()}, tmp_path / "model.sclc")
    native, compact = ((tmp_path / f"model.{end}").stat().st_size for end in ("scln", "sclc"))
    assert native < 1.05 * compact


class TwoMaps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.relu()


class Unflattened(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 4, 8)


class TokensAsAVector(nn.Module):
    """Whose numbers are in another order than the runtime has them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(2).transpose(1, 2).flatten(1))


class Attention(nn.Module):
    """Of queries that are no third of one layer, or whose keys are elsewhere in it."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.layer, self.swapped = nn.Linear(2, 6), swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        three = self.layer(tokens).reshape(len(x), 16, 3, 1, 2).permute(2, 0, 3, 1, 4)
        q, k, v = three.unbind(0)
        if self.swapped:
            q, k = k, q
        y = nn.functional.scaled_dot_product_attention(q if self.swapped else q + 1, k, v)
        return y.transpose(1, 2).reshape(len(x), 16, 2).mean(1)


class SizeByTheValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


class PathByTheValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.sum() > 0 else x.tanh()


def test_shapes_that_depend_on_the_values_are_refused() -> None:
    images = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ExportError, match="must not depend on the values of tensors"):
        lower(PathByTheValues(), images)
    with pytest.raises(ExportError, match=r"the operator gt has no kernel \(nor have .*index"):
        lower(SizeByTheValues(), images)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.ELU()), r"the operator elu \(1\) has no kernel"),
        (nn.GELU("tanh"), "the operator gelu by an approximation has no kernel"),
        (TokensAsAVector(), "the operator flatten to 2×32 has no kernel"),
        (Attention(True), "scaled_dot_product_attention other than of one Linear layer's thirds"),
        (Attention(False), r"the operator unbind has no kernel \(nor have getitem"),
        (nn.Flatten(2), "the operator flatten to 2×2×16 has no kernel"),
        (TwoMaps(), "the operator mul of 2×2×4×4 and 2×2×4×4 has no kernel"),
        (Unflattened(), "the operator reshape to 2×4×8 has no kernel"),
        (nn.MaxPool2d(2, dilation=2), "max_pool2d with a dilation has no kernel"),
        (nn.ConvTranspose2d(2, 2, 2), "the operator conv_transpose2d has no kernel"),
        (nn.AdaptiveAvgPool2d(3), "adaptive_avg_pool2d from 4×4 to 3×3 has no kernel"),
        (nn.Linear(4, 3), "the operator linear of the last of four dimensions has no kernel"),
    ],
)
def test_what_has_no_kernel_is_named(model: nn.Module, sentence: str) -> None:
    with pytest.raises(ExportError, match=f"{sentence}.*convolutional networks, MLPs and ViTs"):
        lower(model, torch.zeros(2, 2, 4, 4))
