"""Networks in the native runtime, and beside what PyTorch makes of them."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from sclcore.export.native import sclrun
from sclcore.export.native.build import compile_sources, write_sources
from sclcore.export.native.file import save_network
from sclcore.export.native.lower import lower
from sclcore.export.native.steps import Kind, Network, Step
from sclcore.kernels.compiler import find_compiler

# Sums of at most 10⁴ float32 products, each rounding 6e-8 of its running sum, through 50 layers:
# seen were 1e-7 to 1e-6 of the largest output. A wrong weight or pixel makes 1e-3 and more.
TOLERANCE = 5e-6
BATCHES = (1, 7, 40)
# A processor that has one of them has those behind it.
KERNELS = ("avx512", "avx2", "baseline")


@functools.cache
def built() -> Path:
    """A folder with the library, which all tests of a process share."""
    folder = Path(tempfile.mkdtemp(prefix="scl-native-"))
    write_sources(folder)
    compile_sources(folder)
    return folder


def runtime_of(model: nn.Module, shape: Sequence[int], path: Path) -> sclrun.Model:
    """`model`, for images of `shape`, in the runtime; its file is `path`."""
    save_network(lower(model, torch.zeros(2, *shape)), path, {})
    return load(path)


def load(path: Path) -> sclrun.Model:
    return sclrun.load(path, library=built() / "libscl.so")


@functools.cache
def kernels_here() -> tuple[str, ...]:
    """Those of `KERNELS` that this processor has; asked while SCL_KERNELS names none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.scln"
        save_network(network_of(nn.Conv2d(2, 3, 3), (2, 5, 5)), path, {})
        return KERNELS[KERNELS.index(load(path).kernels) :]


def network_of(layer: nn.Module, shape: Sequence[int]) -> Network:
    """One layer alone, as `lower` would write it: which traces for half a second."""
    with torch.no_grad():
        made: Any = tuple(layer(torch.zeros(1, *shape)).shape[1:])
    given: Any = tuple(shape)
    network = Network([given, made], source=0, out=1, out_shape=made)
    if isinstance(layer, nn.MaxPool2d):
        step = Step(Kind.MAXPOOL, 0, 1, kernel=pair(layer.kernel_size), stride=pair(layer.stride))
        step.before = pair(layer.padding)
    else:
        assert isinstance(layer, nn.Conv2d)
        spans = [(k - 1) * d // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        step = Step(Kind.CONV, 0, 1, kernel=pair(layer.kernel_size), stride=pair(layer.stride))
        step.dilation, step.groups = pair(layer.dilation), layer.groups
        step.before = pair(spans if layer.padding == "same" else layer.padding)
        step.weight = layer.weight.detach().numpy()
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        step.bias = bias.numpy()
    network.steps.append(step)
    return network


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def noise(batch: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def assert_equal(model: nn.Module, runtime: sclrun.Model, images: Tensor, threads: int = 1) -> None:
    """To what the model computes in float64 and, within as much again, in float32."""
    exact = model.double()(images.double())
    single = model.float()(images)
    found = torch.from_numpy(runtime(images.numpy(), threads)).reshape(exact.shape)
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE * scale)
    torch.testing.assert_close(found, single, rtol=0, atol=2 * TOLERANCE * scale)


@torch.no_grad()
def sparse(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """`model` with as many weights, of the size that keeps signals alive, at random places."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            live = torch.rand(module.weight.shape, generator=generator) < density
            fan_in = max(1.0, density * module.weight[0].numel())
            weight = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
            module.weight.copy_(weight * live)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            mean, variance = module.running_mean, module.running_var
            assert mean is not None and variance is not None
            nn.init.normal_(mean, std=0.2, generator=generator)
            nn.init.uniform_(variance, 0.5, 1.5, generator=generator)
    return model.eval()


def vit(**more: Any) -> nn.Module:
    """A ViT of two blocks for images of 24×24 pixels: 9 patches and the class token."""
    size: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 36, "num_heads": 6}
    model = timm.create_model("vit_tiny_patch16_224", **size, depth=2, num_classes=5, **more)
    if isinstance(model.cls_token, nn.Parameter):
        nn.init.normal_(model.cls_token, generator=torch.Generator().manual_seed(0))
    return model


class Watched:
    """The same source under the address and the undefined-behaviour sanitizer, in a process.

    Each tensor has its own memory there (SCL_CHECK), so that a read beyond its end is seen.
    """

    def __init__(self, folder: Path) -> None:
        write_sources(folder)
        program, flags = folder / "watched", ["-std=gnu11", "-O1", "-g1", "-Wall", "-Wextra"]
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSCL_CHECK"]
        flags += ["-Werror", "-Wno-psabi", "-pthread", f"-I{folder}"]
        sources = [str(folder / "scl.c"), str(Path(__file__).with_name("driver.c"))]
        command = [*find_compiler(), *flags, *sources, "-o", str(program), "-lm"]
        subprocess.run(command, check=True, timeout=120)
        self.folder = folder
        # A file that lies of its sizes gets no gigabytes.
        limits = {"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=256"}
        self.process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | limits,
        )

    def run(self, model: Path, images: Tensor, threads: int = 1) -> Tensor | str:
        """The outputs, flat; or why the model was refused. AssertionError where it was killed."""
        given, made = self.folder / "images", self.folder / "outputs"
        images.numpy().tofile(given)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{model} {given} {made} {len(images)} {threads}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"ended by a sanitizer, which says above why: {self.process.wait(30)}"
        if answer.startswith("refused: "):
            return answer.removeprefix("refused: ").strip()
        return torch.from_numpy(np.fromfile(made, np.float32))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0, "memory was not given back"


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    process = Watched(tmp_path_factory.mktemp("watched"))
    yield process
    process.end()
