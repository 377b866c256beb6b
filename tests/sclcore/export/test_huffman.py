"""HAM and sHAM give back every bit, are as large as counted by hand, and multiply as dense does."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from sclcore.export import ExportError
from sclcore.export.huffman import Ham, Sham
from sclcore.export.huffman.code import LONGEST, check_lengths, code_lengths, encode
from sclcore.export.huffman.decode import decode
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
from tests.sclcore.nets import few_values


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
        f"{density}": few_values((40, 50), density, seed=i)
        for i, density in enumerate((0.02, 0.3, 0.9, 1.0))
    }
    odd = few_values((9, 31), 0.5)
    odd[3:7] = 0
    odd[0, :3] = torch.tensor([torch.nan, torch.inf, 1e-45])
    return found | {
        "convolution": few_values((16, 8, 3, 3), 0.1),
        "wide": few_values((3, 40_000), 0.05, values=300),
        "one value": torch.full((5, 6), 3.0),
        "two values": torch.ones(4, 4).triu(),
        "dead": torch.zeros(7, 5),
        "odd": odd,
        "narrow": few_values((50, 1), 0.5),
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
