"""A compact file gives back every bit, is as small as promised, and says when it is damaged."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sclcore.export.compact
from sclcore.export import ExportError, load_compact, save_compact
from sclcore.export.compact import Entry, read_header
from sclcore.export.values import entropy_bits
from tests.sclcore.export.damage import flip


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(round(1000 * density) + len(shape))
    live = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator).where(live, 0.0).to(dtype)


def odd_state() -> dict[str, Tensor]:
    """All that a state_dict may hold, and more than a network does."""
    state = {
        f"{dtype}-{density}".removeprefix("torch."): sparse((6, 5, 3, 3), density, dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for density in (0.0, 0.004, 0.1, 0.5, 1.0)
    }
    state["float32-0.1"].view(-1)[:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45])
    return state | {
        "bias": torch.zeros(7),
        "counter": torch.tensor(12),
        "flags": torch.tensor([True, False, False]),
        "bytes": torch.arange(-3, 3, dtype=torch.int8),
        "nothing": torch.zeros(0, 4),
        "one": torch.zeros(1, 1),
        "last": torch.nn.functional.pad(torch.ones(1), (999, 0)),
        "strided": torch.arange(12.0).reshape(3, 4).T,
    }


def same(one: Tensor, other: Tensor) -> bool:
    """By the bytes that numpy sees."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    views = [t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in (one, other)]
    return views[0] == views[1]


def test_every_bit_comes_back(tmp_path: Path) -> None:
    state, path = odd_state(), tmp_path / "model.sclc"
    entries = save_compact(state, path, metadata={"model": "odd"})
    read = load_compact(path)
    assert list(read) == list(state)
    assert [name for name in state if not same(read[name], state[name])] == []
    assert read_header(path) == (entries, {"model": "odd"})
    assert {entry.positions for entry in entries} >= {"all", "mask", "rice"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.sclc"]


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_a_reader_written_from_the_specification_agrees(values: str, tmp_path: Path) -> None:
    state = {
        "conv": sparse((8, 4, 3, 3), 0.1),
        "dense": sparse((8, 9), 0.5),
        "norm": torch.ones(8),
        "transposed": sparse((4, 6, 2, 2), 0.2),
        "dead": torch.zeros(5, 5),
    }
    path = tmp_path / "model.sclc"
    features = {"conv": 0, "dense": 0, "transposed": 1, "dead": 0}
    save_compact(state, path, values=values, connections=features)
    read = load_compact(path)
    for name, value in by_the_book(path).items():
        assert np.array_equal(value, read[name].numpy()), name
    for name, weight in state.items():
        expected = weight.numpy()
        if values == "float16" and name in features:
            expected = expected.astype(np.float16).astype(np.float32)
        elif values == "int8" and name in features:
            other = tuple(d for d in range(weight.ndim) if d != features[name])
            scale = np.abs(expected).max(other, keepdims=True) / np.float32(127)
            expected = np.round(expected / np.where(scale > 0, scale, 1)).astype(np.int8) * scale
        assert np.array_equal(read[name].numpy(), expected), name


def by_the_book(path: Path) -> dict[str, np.ndarray]:
    """A slow reader of docs/export.md's specification, which shares no code with ours."""
    data = path.read_bytes()
    assert data[:8] == b"SCLSPARS" and struct.unpack("<H", data[8:10]) == (1,)
    (length,) = struct.unpack("<I", data[10:14])
    header, offset = json.loads(zlib.decompress(data[14 : 14 + length])), 14 + length
    found = {}
    for tensor in header["tensors"]:
        sections = []
        for size in tensor["sections"]:
            part = data[offset : offset + abs(size)]
            sections.append(zlib.decompress(part) if size < 0 else part)
            offset += abs(size)
        found[tensor["name"]] = _tensor_by_the_book(tensor, sections)
    assert data[offset:] == struct.pack("<I", zlib.crc32(data[:offset]))
    return found


def _tensor_by_the_book(tensor: dict[str, Any], sections: list[bytes]) -> np.ndarray:
    size = int(np.prod(tensor["shape"]))
    live: list[int] = list(range(size))
    if tensor["positions"] == "mask":
        bits = _bits(sections.pop(0))
        live = [i for i in range(size) if bits[i] == "1"]
    elif tensor["positions"] == "rice":
        quotients = [len(zeros) for zeros in _bits(sections.pop(0)).split("1")]
        remainders, k, at = _bits(sections.pop(0)), tensor["k"], -1
        live = []
        for i in range(tensor["live"]):
            low = int(remainders[i * k : i * k + k][::-1] or "0", 2)
            at += (quotients[i] << k) + low + 1
            live.append(at)
    elif tensor["positions"] == "csr":
        raise AssertionError("none is expected here")
    scales = sections.pop(0) if tensor["values"] == "int8" else None
    elements = b"".join(bytes(planes) for planes in zip(*sections, strict=True))
    types = {"float32": "<f4", "float16": "<f2", "int8": "<i1"}
    dense = np.zeros(size, np.float32)
    dense[live] = np.frombuffer(elements, types[tensor["values"]])
    dense = dense.reshape(tensor["shape"])
    if scales is not None:
        shape = [-1 if d == tensor["axis"] else 1 for d in range(dense.ndim)]
        dense = dense * np.frombuffer(scales, "<f4").reshape(shape)
    return dense


def _bits(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


@pytest.mark.parametrize("density", [0.002, 0.01, 0.03, 0.1, 0.2, 0.5, 0.9])
def test_positions_come_close_to_their_entropy(density: float, tmp_path: Path) -> None:
    """A Rice code has whole bits for gaps whose ideal lengths are no whole ones: 0 to 4 % more."""
    weight = sparse((400, 500), density)
    [entry] = save_compact({"w": weight}, tmp_path / "w.sclc")
    sections = {"mask": 1, "csr": 2, "rice": 2}[entry.positions]
    positions = sum(abs(size) for size in entry.sections[:sections])
    bound = entropy_bits(weight.numel(), entry.live) / 8
    # Below 1: how the live ones happen to lie can help a code, by much less than 1 % here.
    # Above a half, where gaps are mostly 0, the mask is deflated instead, which is no such code.
    most = 1.045 * bound if density <= 0.5 else 0.6 * weight.numel() / 8
    assert 0.99 * bound <= positions <= min(most, weight.numel() / 8) + 2


def test_csr_where_rows_are_crowded_or_empty(tmp_path: Path) -> None:
    """A few live columns in one row: what a code of gaps with one parameter is bad at."""
    weight = torch.zeros(40, 256)
    weight[7] = 1.0
    weight[0, 0] = weight[39, 255] = 2.0
    state, path = {"w": weight}, tmp_path / "w.sclc"
    save_compact(state, path)
    assert same(load_compact(path)["w"], weight)
    live = np.flatnonzero(weight.numpy())
    from sclcore.export import positions

    code = positions.csr_code(live, weight.numel(), 40)
    assert np.array_equal(positions.read_csr(code, weight.numel(), 40), live)
    # 258 columns of one byte, 40 counts of two, since a row may have 256.
    assert [len(part) for part in code] == [80, 258]


def test_a_model_is_smaller_than_gzip_makes_it(tmp_path: Path) -> None:
    weight = sparse((256, 1152), 0.05)
    save_compact({"w": weight}, tmp_path / "w.sclc")
    gzipped = len(zlib.compress(weight.numpy().tobytes(), 9))
    assert (tmp_path / "w.sclc").stat().st_size < 0.8 * gzipped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(0.0), "is no compact file"),
        (lambda data: data[:8] + b"\x02\x00" + data[10:], "has version 2; this program reads 1"),
        (flip(0.3), "its checksum does not match"),
        (flip(1.0), "its checksum does not match"),
        (lambda data: data[:-20], "its checksum does not match"),
        (lambda data: data[:5], "is no compact file"),
        (lambda data: b"", "is no compact file"),
    ],
)
def test_damage_is_named(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.sclc"
    save_compact({"w": sparse((30, 30), 0.1)}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=message):
        load_compact(path)


@pytest.mark.parametrize(
    "wrong", [{"live": 3}, {"k": 1}, {"k": 99}, {"positions": "morse"}, {"shape": [2, 2]}]
)
def test_a_header_that_contradicts_the_content(wrong: dict[str, Any], tmp_path: Path) -> None:
    """With a checksum that matches: whoever wrote it was wrong."""
    path = tmp_path / "model.sclc"
    save_compact({"w": sparse((30, 30), 0.1)}, path)
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[10:14])
    head = json.loads(zlib.decompress(data[14 : 14 + length]))
    head["tensors"][0] |= wrong
    header = zlib.compress(json.dumps(head).encode())
    content = data[:10] + struct.pack("<I", len(header)) + header + data[14 + length : -4]
    path.write_bytes(content + struct.pack("<I", zlib.crc32(content)))
    with pytest.raises(ExportError, match=r"model\.sclc: tensor w is damaged"):
        load_compact(path)


def test_negative_zeros_are_values_of_their_own(tmp_path: Path) -> None:
    """What w * mask leaves where w < 0: other bits than 0, so they take room."""
    weight = sparse((64, 64), 1.0) * (sparse((64, 64), 0.1) != 0)
    [entry] = save_compact({"w": weight}, tmp_path / "w.sclc")
    assert same(load_compact(tmp_path / "w.sclc")["w"], weight)
    assert entry.live > 0.4 * weight.numel()
    [entry] = save_compact({"w": weight + 0.0}, tmp_path / "w.sclc")
    assert entry.live == int(torch.count_nonzero(weight)) < 0.12 * weight.numel()


def test_values_without_room_are_named(tmp_path: Path) -> None:
    path, large = tmp_path / "model.sclc", torch.tensor([[1e5, 0.0]])
    with pytest.raises(ExportError, match=r"head cannot be written as float16: .* beyond 65504"):
        save_compact({"head": large}, path, values="float16", connections={"head": 0})
    with pytest.raises(ExportError, match=r"head cannot be written as int8: .* not finite"):
        save_compact({"head": large / 0}, path, values="int8", connections={"head": 0})
    with pytest.raises(ValueError, match="values must be one of float32, float16, int8"):
        save_compact({"head": large}, path, values="int4")
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.sclc"
    save_compact({"w": torch.ones(2, 2)}, path)
    before, encode = path.read_bytes(), sclcore.export.compact._encode

    def one_weight_less(
        name: str, tensor: Tensor, values: str, axis: int | None
    ) -> tuple[Entry, list[bytes]]:
        less = tensor.clone()
        less.view(-1)[0] = 0
        return encode(name, less, values, axis)

    monkeypatch.setattr(sclcore.export.compact, "_encode", one_weight_less)
    with pytest.raises(ExportError, match="w reads back with other values"):
        save_compact({"w": sparse((9, 9), 1.0)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.sclc"]
    assert path.read_bytes() == before
