"""HAM and sHAM give back every bit, are as large as counted by hand, and multiply as dense does."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
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
from sclcore.export.huffman.code import LONGEST, check_lengths, code_lengths, encode
from sclcore.export.huffman.decode import decode
from sclcore.export.huffman.file import CodedEntry, read_huffman_header
from sclcore.export.huffman.native import find_kernel
from sclcore.export.huffman.sizes import (
    Counts,
    csc,
    ham_bound,
    psi,
    section_bytes,
    sham_bound,
    stream_bits,
)


def coded(shape: tuple[int, ...], density: float, values: int = 8, seed: int = 0) -> Tensor:
    """A weight with `values` different live values, some of them far more frequent."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(shape, generator=generator) < density
    few = torch.randn(values, generator=generator)
    index = (torch.rand(shape, generator=generator) ** 3 * values).long()
    return few[index].where(live, 0.0)


@pytest.fixture(params=["C", "numpy"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both readers of codewords."""
    monkeypatch.setenv("SCL_FUSED", "0" if request.param == "numpy" else "1")
    assert (find_kernel() is None) == (request.param == "numpy")


both_readers = pytest.mark.usefixtures("reader")

# --- the code -------------------------------------------------------------------------------------


@cache
def complete(size: int, deepest: int) -> list[tuple[int, ...]]:
    """All lengths, rising, of `size` codewords that fill a tree of `deepest` levels."""
    if size == 1:
        return [(0,)]
    if deepest == 0:
        return []
    found = set()
    for left in range(1, size):
        for one in complete(left, deepest - 1):
            for other in complete(size - left, deepest - 1):
                found.add(tuple(sorted(n + 1 for n in (*one, *other))))
    return sorted(found)


def test_no_prefix_code_is_shorter() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        size = int(generator.integers(2, 8))
        counts = -np.sort(-generator.integers(1, 1 + 10 ** generator.integers(1, 5), size))
        lengths = code_lengths(counts)
        check_lengths(lengths)
        least = min(int((counts * np.array(way)).sum()) for way in complete(size, size - 1))
        assert stream_bits(counts) == int((counts * lengths).sum()) == least


@both_readers
def test_symbols_come_back_over_blocks_and_long_codewords() -> None:
    generator = np.random.default_rng(1)
    fibonacci = [1, 1]
    while len(fibonacci) < 36:
        fibonacci.append(sum(fibonacci[-2:]))
    for counts in (
        np.array(fibonacci[::-1]),
        np.array([5, 5, 5]),
        np.array([10**6, 1]),
        np.arange(1000, 0, -1),
    ):
        lengths = code_lengths(counts)
        # All symbols alike, so that the longest codewords cross the ends of blocks.
        symbols = generator.integers(0, len(counts), 70_000)
        stream = encode(symbols, lengths)
        assert len(stream) == -(-int(lengths[symbols].sum()) // 8)
        found = np.concatenate(list(decode(stream, lengths, len(symbols))))
        assert np.array_equal(found, symbols)
    assert code_lengths(np.array(fibonacci[::-1]))[-1] == 35
    assert np.concatenate(list(decode(b"", np.zeros(1, np.int64), 7))).tolist() == [0] * 7


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 2], [2, 1, 2], [0, 1], [LONGEST + 1] * 2])
def test_lengths_that_make_no_code(lengths: list[int]) -> None:
    with pytest.raises(ExportError, match="the lengths of its codewords make no code"):
        check_lengths(np.array(lengths))


@both_readers
@pytest.mark.parametrize(
    ("cut", "count", "message"),
    [
        (slice(0, -1), 40_000, "ends before its last value|another number of values"),
        (slice(0, 10), 40_000, "ends before its last value"),
        (slice(0, 0), 40_000, "ends before its last value"),
        (slice(0, None), 39_000, "another number of values"),
        (slice(0, None), 41_000, "ends before its last value"),
        (slice(0, None), 0, "another number of values"),
    ],
)
def test_a_stream_is_never_read_past_its_end(cut: slice, count: int, message: str) -> None:
    lengths = np.array([1, 2, 3, 3])
    stream = encode(np.random.default_rng(2).integers(0, 4, 40_000), lengths)
    with pytest.raises(ExportError, match=message):
        list(decode(stream[cut], lengths, count))


# --- matrices -------------------------------------------------------------------------------------


def test_a_matrix_counted_by_hand() -> None:
    """18 zeros and seven different values: what the bits that the paper gives for its 5 × 5 matrix
    (1), 45 in HAM and 20 in sHAM, are the bits of. By hand: seven equally frequent values take one
    codeword of 2 bits and six of 3, which is 20; 18 zeros then take 1 bit each, and every other
    codeword is one longer.
    """
    weight = torch.zeros(5, 5)
    weight.view(-1)[torch.tensor([0, 2, 6, 10, 11, 14, 24])] = torch.arange(1.0, 8.0)
    counts = Counts.of(weight)
    assert stream_bits(counts.with_zero()) == 18 + 7 + 20 == 45
    assert stream_bits(counts.counts) == 2 + 6 * 3 == 20
    assert len(Ham.of(weight).stream.bits) == 6 and len(Sham.of(weight).stream.bits) == 3
    # Of each row: two, one, three, none, one; of each value: its column.
    assert Sham.of(weight).sections()[3:] == [bytes([2, 1, 3, 0, 1]), bytes([0, 2, 1, 0, 1, 4, 4])]


def matrices() -> dict[str, Tensor]:
    found = {
        f"{density}": coded((40, 50), density, seed=i)
        for i, density in enumerate((0.02, 0.3, 0.9, 1.0))
    }
    odd = coded((9, 31), 0.5)
    odd[3:7] = 0
    odd[0, :3] = torch.tensor([torch.nan, torch.inf, 1e-45])
    return found | {
        "convolution": coded((16, 8, 3, 3), 0.1),
        "wide": coded((3, 40_000), 0.05, values=300),
        "one value": torch.full((5, 6), 3.0),
        "two values": torch.ones(4, 4).triu(),
        "dead": torch.zeros(7, 5),
        "odd": odd,
        "narrow": coded((50, 1), 0.5),
    }


@both_readers
@pytest.mark.parametrize("form", [Ham, Sham])
@pytest.mark.parametrize("name", matrices())
def test_every_bit_comes_back(name: str, form: type[Ham] | type[Sham]) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        weight = matrices()[name].to(dtype)
        matrix = form.of(weight)
        again = form.read(matrix.sections(), dtype, weight.shape)
        for each in (matrix.dense(), again.dense()):
            assert each.dtype == dtype and each.shape == weight.shape
            assert torch.equal(each.view(torch.uint8), weight.view(torch.uint8))


@both_readers
@pytest.mark.parametrize("name", [n for n in matrices() if n not in ("odd", "convolution")])
def test_products_are_those_of_the_dense_weight(name: str) -> None:
    weight = matrices()[name]
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(5))
    expected = x.double() @ weight.double().T
    # Sums of up to 40,000 products in float32, each rounded by 6e-8, in another order.
    most = 1e-5 * (x.abs() @ weight.abs().T + 1e-6)
    for matrix in (Ham.of(weight), Sham.of(weight)):
        found = matrix.linear(x)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert bool(((found - expected).abs() <= most).all())
    with pytest.raises(ValueError, match="takes no input"):
        Ham.of(weight).linear(torch.zeros(2, weight.shape[1] + 1))


@pytest.mark.parametrize("name", [n for n in matrices() if n != "odd"])
def test_sizes_are_as_predicted_and_below_their_bounds(name: str) -> None:
    weight = matrices()[name]
    counts = Counts.of(weight)
    for form, matrix, bound in (("ham", Ham, ham_bound), ("sham", Sham, sham_bound)):
        sections = [len(section) for section in matrix.of(weight).sections()]
        assert section_bytes(form, counts) == sections
        assert psi(sections, counts) <= bound(counts)


def test_the_formulas_by_hand() -> None:
    """1,000 rows and 500 columns, 16 values of 1,250 weights each: every codeword has 4 bits."""
    counts = Counts(rows=1000, columns=500, counts=np.full(16, 1250))
    assert csc(counts) == (40_000 + 501) / 500_000
    # 20,000 · (1 + 4) bits of stream, 20,000 row indices and 501 bounds of 16 bits, 96 words.
    expected = (20_000 * 5 / 32 + 20_000 / 2 + 501 / 2 + 96) / 500_000
    assert sham_bound(counts) == pytest.approx(expected, rel=1e-12)
    sections = [16 * 4, 5, 20_000 * 4 // 8, 500 * 2, 20_000 * 2]
    assert section_bytes("sham", counts) == sections
    assert psi(sections, counts) == sum(sections) / 2_000_000
    # With 0, 17 values; log₂ 17 = 4.0875.
    assert ham_bound(counts) == pytest.approx((1 + 4.087463) / 32 + 6 * 17 / 500_000, rel=1e-6)


# --- files ----------------------------------------------------------------------------------------


def state() -> dict[str, Tensor]:
    return {
        "conv": coded((8, 4, 3, 3), 0.2),
        "norm": torch.ones(8),
        "linear": coded((40, 72), 0.1),
        "half": coded((20, 30), 0.3).to(torch.bfloat16),
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


def _flip(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        index = int(at * (len(data) - 1))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip(0.0), "is no HAM or sHAM file"),
        (lambda data: data[:8] + b"\x02\x00" + data[10:], "has version 2; this program reads 1"),
        (_flip(0.3), "its checksum does not match"),
        (_flip(1.0), "its checksum does not match"),
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
    save_huffman({"w": coded((30, 30), 0.3)}, path, form=form, connections=["w"])
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
        save_huffman({"w": coded((30, 30), 0.3)}, path, form="sham", connections=["w"])
    assert list(tmp_path.iterdir()) == []
