"""How large a matrix is in each format, predicted; ψ is the share of 32 bits an element.

Source: Marinò et al. (ICPR 2020), with n rows, m columns (output features, sclcore's
`out`), q live elements and k different values:

    CSC   ψ = (2q + m + 1) / nm
    HAM   ψ ≤ (1 + log₂ k) / 32 + 6k / nm
    sHAM  ψ ≤ q (1 + log₂ k) / 32nm + 6k / nm + q b_r / 32nm + (m + 1) b_c / 32nm

The last differs from the paper's, whose (n + m + 1) / nm counts n row indices where there are q of
them, and 32 bits for each: here one takes b_r bits and a column's bound b_c. 6k / nm are two
dictionaries of 3k words of 32 bits, by which codewords are found from values and values from
codewords; a canonical code needs one of k words and a number for each length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sclcore.export import positions
from sclcore.export.huffman.code import Indices, code_lengths
from sclcore.export.values import bits_of

WORD = 32


@dataclass(frozen=True)
class Counts:
    """What the size of a matrix follows from.

    `rows` (n, the fan-in) × `columns` (m, the output features) elements, of which `counts` have
    each of the live values, the most frequent first.
    """

    rows: int
    columns: int
    counts: Indices

    @classmethod
    def of(cls, weight: Tensor) -> Counts:
        """Of a weight [out, ...]."""
        bits = bits_of(weight)
        _, counts = np.unique(bits[bits != 0], return_counts=True)
        columns = weight.shape[0]
        return cls(weight.numel() // columns, columns, -np.sort(-counts))

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def live(self) -> int:
        return int(self.counts.sum())

    @property
    def values(self) -> int:
        return len(self.counts)

    def with_zero(self) -> Indices:
        """The counts of all values, 0 included."""
        zeros = self.size - self.live
        return -np.sort(-np.append(self.counts, zeros)) if zeros else self.counts


def csc(of: Counts) -> float:
    """ψ of plain compressed sparse columns."""
    return (2 * of.live + of.columns + 1) / of.size


def ham_bound(of: Counts) -> float:
    """The ψ that HAM does not exceed."""
    k = len(of.with_zero())
    return _stream_bound(of.size, k) / of.size + 6 * k / of.size


def sham_bound(of: Counts) -> float:
    """The ψ that sHAM does not exceed, with the index types that `Sham` has."""
    stream = _stream_bound(of.live, of.values)
    bounds = (of.columns + 1) * _bits(of.rows)
    return (stream + 6 * of.values + (of.live * _bits(of.rows - 1) + bounds) / WORD) / of.size


def stream_bits(counts: Indices) -> int:
    """Bits that the values with these counts take, most frequent first: Σ counts · lengths."""
    return int((counts * code_lengths(counts)).sum())


def section_bytes(form: str, of: Counts, width: int = 4) -> list[int]:
    """Bytes of each section of a matrix in the file, for values of `width` bytes, by its counts."""
    counts = of.with_zero() if form == "ham" else of.counts
    lengths = code_lengths(counts)
    per_length = int(lengths.max(initial=0)) + 1 if len(lengths) else 0
    stream = [
        width * len(counts),
        per_length * positions.unsigned(len(counts)).itemsize,
        -(-stream_bits(counts) // 8),
    ]
    if form == "ham":
        return stream
    column_counts = of.columns * _bits(of.rows) // 8
    return [*stream, column_counts, of.live * _bits(of.rows - 1) // 8]


def psi(sections: Sequence[int], of: Counts) -> float:
    """ψ of so many bytes."""
    return 8 * sum(sections) / (WORD * of.size)


def _stream_bound(count: int, values: int) -> float:
    """Words of `count` Huffman codewords, by Shannon's H + 1 ≤ log₂ k + 1."""
    return count * (1 + math.log2(values)) / WORD if values else 0.0


def _bits(largest: int) -> int:
    return 8 * positions.unsigned(largest).itemsize
