"""HAM and sHAM files give back the model, are read by the book, and are refused when damaged."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sclcore.export.huffman.file
from sclcore.export import (
    ExportError,
    NothingSmaller,
    load_compact,
    load_huffman,
    open_huffman,
    save_huffman,
)
from sclcore.export.huffman import Ham, Sham
from sclcore.export.huffman.file import CodedEntry, read_huffman_header
from tests.sclcore.export.damage import flip
from tests.sclcore.nets import few_values


def state() -> dict[str, Tensor]:
    return {
        "conv": few_values((8, 4, 3, 3), 0.2),
        "norm": torch.ones(8),
        "linear": few_values((40, 72), 0.1),
        "half": few_values((20, 30), 0.3).to(torch.bfloat16),
        "steps": torch.tensor(12),
        "learned": torch.randn(20, 30, generator=torch.Generator().manual_seed(0)),
    }


CONNECTIONS = ("conv", "linear", "half", "learned")


@pytest.mark.parametrize("form", ["ham", "sham"])
def test_a_file_gives_back_the_model(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{form}"
    entries = save_huffman(
        state(), path, form=form, connections=CONNECTIONS, metadata={"model": "odd"}
    )
    read = load_huffman(path)
    assert list(read) == list(state())
    for name, tensor in state().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert read_huffman_header(path) == (entries, {"model": "odd"})
    # Six hundred different values would only be larger.
    forms = {entry.name: entry.form for entry in entries}
    assert forms == dict.fromkeys(state(), "plain") | dict.fromkeys(CONNECTIONS[:3], form)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    opened, x = open_huffman(path), torch.randn(3, 72)
    linear = opened["linear"]
    assert isinstance(linear, Ham | Sham) and isinstance(opened["norm"], Tensor)
    assert torch.allclose(linear.linear(x), x @ state()["linear"].T, atol=1e-5)
    with pytest.raises(ExportError, match="is no compact file"):
        load_compact(path)


@pytest.mark.parametrize("form", ["ham", "sham"])
def test_a_reader_written_from_the_specification_agrees(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_huffman(state(), path, form=form, connections=CONNECTIONS)
    for name, value in by_the_book(path).items():
        expected = state()[name].contiguous().flatten().view(torch.uint8)
        assert value == expected.numpy().tobytes(), name


def by_the_book(path: Path) -> dict[str, bytes]:
    """A slow reader of docs/formats.md's specification, which shares no code with ours."""
    data = path.read_bytes()
    assert data[:8] == b"SCLHUFFM" and struct.unpack("<H", data[8:10]) == (1,)
    (length,) = struct.unpack("<I", data[10:14])
    header, at = json.loads(zlib.decompress(data[14 : 14 + length])), 14 + length
    found = {}
    for tensor in header["tensors"]:
        sections = []
        for size in tensor["sections"]:
            sections.append(data[at : at + size])
            at += size
        found[tensor["name"]] = _tensor_by_the_book(tensor, sections)
    assert data[at:] == struct.pack("<I", zlib.crc32(data[:at]))
    return found


def _tensor_by_the_book(tensor: dict[str, Any], sections: list[bytes]) -> bytes:
    if tensor["form"] == "plain":
        return sections[0]
    width = {"float32": 4, "bfloat16": 2}[tensor["dtype"]]
    values = [sections[0][i : i + width] for i in range(0, len(sections[0]), width)]
    # Less than 256 codewords, so that each number is a byte.
    words: dict[str, bytes] = {}
    word, before = -1, 0
    for bits, how_many in enumerate(sections[1]):
        for _ in range(how_many):
            word = (word + 1) << (bits - before)
            before = bits
            words[f"{word:0{bits}b}"] = values[len(words)]
    elements, read = [], ""
    for bit in "".join(f"{byte:08b}" for byte in sections[2]):
        read += bit
        if read in words:
            elements.append(words[read])
            read = ""
    size = int(np.prod(tensor["shape"]))
    if tensor["form"] == "ham":
        return b"".join(elements[:size])
    fan_in, dense, places = size // tensor["shape"][0], [b"\0" * width] * size, iter(sections[4])
    taken = iter(elements)
    for row, how_many in enumerate(sections[3]):
        for _ in range(how_many):
            dense[row * fan_in + next(places)] = next(taken)
    return b"".join(dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(0.0), "is no HAM or sHAM file"),
        (lambda data: data[:8] + b"\x02\x00" + data[10:], "has version 2; this program reads 1"),
        (flip(0.3), "its checksum does not match"),
        (flip(1.0), "its checksum does not match"),
        (lambda data: data[:-20], "its checksum does not match"),
        (lambda data: data[:5], "is no HAM or sHAM file"),
        (lambda data: b"", "is no HAM or sHAM file"),
    ],
)
def test_damage_is_named(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.sham"
    save_huffman(state(), path, form="sham", connections=CONNECTIONS)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=message):
        load_huffman(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With another header and a checksum that matches: whoever wrote it was wrong."""
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[10:14])
    head = json.loads(zlib.decompress(data[14 : 14 + length]))
    change(head["tensors"][0])
    header = zlib.compress(json.dumps(head).encode())
    content = data[:10] + struct.pack("<I", len(header)) + header + data[14 + length : -4]
    path.write_bytes(content + struct.pack("<I", zlib.crc32(content)))


@pytest.mark.parametrize("form", ["ham", "sham"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [2, 2]},
        {"shape": [31, 30]},
        {"form": "morse"},
        {"dtype": "float16"},
        {"dtype": "quaternion"},
        {"form": "plain"},
    ],
)
def test_a_header_that_contradicts_the_content(
    wrong: dict[str, Any], form: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.coded"
    save_huffman({"w": few_values((30, 30), 0.3)}, path, form=form, connections=["w"])
    rewritten(path, lambda tensor: tensor.update(wrong))
    with pytest.raises(ExportError, match=r"model\.coded: tensor w is damaged"):
        load_huffman(path)


@pytest.mark.parametrize("form", ["ham", "sham"])
def test_sections_that_were_moved(form: str, tmp_path: Path) -> None:
    """A byte of one section counted to its neighbour: refused, whichever it is."""
    path = tmp_path / "model.coded"
    sections = len(save_huffman(state(), path, form=form, connections=CONNECTIONS)[0].sections)
    whole = path.read_bytes()

    def shift(tensor: dict[str, Any], at: int) -> None:
        tensor["sections"][at] -= 1
        tensor["sections"][at + 1] += 1

    for at in range(sections - 1):
        path.write_bytes(whole)
        rewritten(path, lambda tensor, at=at: shift(tensor, at))
        with pytest.raises(ExportError, match="tensor conv is damaged"):
            load_huffman(path)
    path.write_bytes(whole)
    rewritten(path, lambda tensor: tensor["sections"].append(3))
    with pytest.raises(ExportError, match="its header speaks of other sections than it has"):
        load_huffman(path)


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, many = tmp_path / "model.ham", torch.randn(60, 60)
    with pytest.raises(NothingSmaller, match="no layer would be smaller so"):
        save_huffman({"w": many}, path, form="ham", connections=["w"])
    with pytest.raises(NothingSmaller, match="no layer would be smaller so"):
        save_huffman({"w": torch.randn(300, 300)}, path, form="ham", connections=["w"])
    with pytest.raises(ValueError, match="form must be one of ham, sham, not 'zip'"):
        save_huffman({"w": many}, path, form="zip", connections=["w"])
    with pytest.raises(ExportError, match="c cannot be written as plain"):
        save_huffman({"c": torch.zeros(2, dtype=torch.complex64)}, path, form="ham", connections=[])
    encode_tensor = sclcore.export.huffman.file._encode

    def one_weight_less(name: str, tensor: Tensor, form: str) -> tuple[CodedEntry, list[bytes]]:
        less = tensor.clone()
        less.view(-1)[int(tensor.view(-1).nonzero()[0])] = 0
        return encode_tensor(name, less, form)

    monkeypatch.setattr(sclcore.export.huffman.file, "_encode", one_weight_less)
    with pytest.raises(ExportError, match="w reads back with other values"):
        save_huffman({"w": few_values((30, 30), 0.3)}, path, form="sham", connections=["w"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fused", ["0", "1"])
@pytest.mark.parametrize("form", ["ham", "sham"])
def test_bytes_that_were_changed_with_their_checksum(
    form: str, fused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights or a refusal, by both readers of codewords; nothing else."""
    monkeypatch.setenv("SCL_FUSED", fused)
    path = tmp_path / "model"
    save_huffman(state(), path, form=form, connections=CONNECTIONS)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    (length,) = struct.unpack("<I", whole[10:14])
    for _ in range(150):
        content = bytearray(whole[:-4])
        for _ in range(generator.choice((1, 2, 8))):
            content[generator.randrange(14 + length, len(content))] = generator.randrange(256)
        path.write_bytes(bytes(content) + struct.pack("<I", zlib.crc32(content)))
        try:
            assert load_huffman(path).keys() == state().keys()
        except ExportError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert 0 < refused < 150
