"""Random layers and damaged files, in a program that ends at the first read beyond an end."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from launcher.models.small import SmallConvNet
from sclcore.export.native.file import save_network
from sclcore.export.native.lower import lower
from tests.sclcore.export.damage import flip
from tests.sclcore.export.native.native import (
    TOLERANCE,
    Watched,
    load,
    network_of,
    noise,
    runtime_of,
    sparse,
    vit,
)

_FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def layers(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution or a pool that gives more than one pixel, and the shape of its images."""

    def number(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    kernel, stride, dilation = (
        (number(1, 5), number(1, 5)),
        (number(1, 3), number(1, 3)),
        number(1, 2),
    )
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    padding = (number(0, 3), number(0, 3))
    span = [(k - 1) * dilation + 1 for k in kernel]
    size = [max(1, s - 2 * p) + number(0, 20) for s, p in zip(span, padding, strict=True)]
    channels = groups * number(1, 4)
    if draw(st.booleans()) or kernel == (1, 1):
        layer: nn.Module = nn.Conv2d(
            channels, groups * number(1, 5), kernel, stride, padding, dilation, groups
        )
        sparse(nn.Sequential(layer), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), number(0, 99))
    else:
        padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
        size = [max(1, k - 2 * p) + number(0, 20) for k, p in zip(kernel, padding, strict=True)]
        layer = nn.MaxPool2d(kernel, stride, padding)
    return layer, (channels, *size)


@_FEW
@given(drawn=layers(), batch=st.sampled_from([1, 2, 7, 17, 40]), threads=st.integers(1, 3))
def test_random_layers(
    drawn: tuple[nn.Module, tuple[int, ...]],
    batch: int,
    threads: int,
    watched: Watched,
    tmp_path: Path,
) -> None:
    layer, shape = drawn
    with torch.no_grad():
        expected = layer.double()(noise(batch, shape).double())
        layer.float()
    if expected.shape[2:] == (1, 1) and isinstance(layer, nn.Conv2d):
        return  # lower makes a Linear layer of it
    path = tmp_path / "model.scln"
    save_network(network_of(layer, shape), path, {})
    found = watched.run(path, noise(batch, shape), threads)
    assert isinstance(found, Tensor)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.flatten(), rtol=0, atol=TOLERANCE * scale)


@pytest.fixture(scope="module")
def written_vit(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("written") / "model.scln"
    save_network(lower(sparse(vit(in_chans=2), 0.3), torch.zeros(2, 2, 24, 24)), path, {})
    return path.read_bytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("written") / "model.scln"
    model = sparse(SmallConvNet(in_chans=2, width=4), 0.3)
    save_network(lower(model, torch.zeros(2, 2, 8, 8)), path, {"model": "small_convnet"})
    return path.read_bytes()


def test_damaged_files_are_refused(written: bytes, watched: Watched, tmp_path: Path) -> None:
    path, images = tmp_path / "damaged.scln", noise(1, (2, 8, 8))
    path.write_bytes(written)
    assert isinstance(watched.run(path, images), Tensor)
    # At every length up to the first weights, then at some.
    lengths = [*range(0, 900, 11), *range(900, len(written), 97)]
    damaged = [written[:length] for length in lengths]
    damaged += [flip(at / 100)(written) for at in range(101)]
    damaged += [written + b"\0", b"SCLSPARS" + written[8:], written[:8] + b"\2" + written[9:]]
    for content in damaged:
        path.write_bytes(content)
        answer = watched.run(path, images)
        assert isinstance(answer, str) and answer.startswith(("the file", "this is no file")), (
            answer
        )
    assert watched.run(tmp_path / "none", images) == f"{tmp_path / 'none'} cannot be read"
    with pytest.raises(ValueError, match="its checksum does not match"):
        path.write_bytes(flip(0.5)(written))
        load(path)


def _with_checksum(content: bytes) -> bytes:
    return content[:-4] + struct.pack("<I", zlib.crc32(content[:-4]))


@_FEW
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    tokens=st.booleans(),
)
def test_files_that_lie_do_no_harm(
    changes: list[tuple[float, int]],
    tokens: bool,
    written: bytes,
    written_vit: bytes,
    watched: Watched,
    tmp_path: Path,
) -> None:
    """With a right checksum, whatever the numbers of the program are: refused, or run within
    its memory."""
    sound = written_vit if tokens else written
    start = 14 + struct.unpack("<I", sound[10:14])[0]
    # The program, and the first bytes of positions: a value of a weight does no harm.
    lying = bytearray(sound)
    for at, value in changes:
        lying[start + int(at * (800 if tokens else 400))] = value
    path = tmp_path / "lying.scln"
    path.write_bytes(_with_checksum(bytes(lying)))
    watched.run(path, noise(1, (2, 64, 64)))


def test_whole_networks_under_sanitizers(watched: Watched, tmp_path: Path) -> None:
    path = tmp_path / "model.scln"
    networks: list[tuple[nn.Module, tuple[int, ...]]] = [
        (SmallConvNet(in_chans=3, width=8, norm="batch"), (3, 8, 12)),
        (SmallConvNet(in_chans=1, width=8, norm="group"), (1, 8, 8)),
        (vit(), (3, 24, 24)),
    ]
    for (model, shape), batch in itertools.product(networks, (1, 5, 33)):
        sparse(model, 0.2)
        images = noise(batch, shape)
        expected = runtime_of(model, shape, path)(images.numpy())
        found = watched.run(path, images, threads=2)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, torch.from_numpy(expected).flatten(), rtol=0, atol=1e-5)
