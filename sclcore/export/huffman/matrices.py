"""HAM and sHAM: a matrix as Huffman codewords of its values, and products straight from them.

After Marinò, Ghidoli, Frasca and Malchiodi (ICPR 2020), with the canonical code of their later
work. Their matrix W has a column for each output feature (y = x W) and is coded column by column.
PyTorch's weight [out, ...] is its transpose, so that their columns are its rows, and their order is
the order in memory: a weight of any shape is taken as a matrix out × fan-in, row by row.

- `ham`: a codeword for every element, 0 included;
- `sham`: compressed sparse columns, of which the live values are codewords; how many each column
  has (the differences of the paper's cb) and the row of each (ri) lie beside them, in the narrowest
  unsigned types that hold the fan-in and its largest index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclcore.export import positions
from sclcore.export.files import ExportError
from sclcore.export.huffman.code import Indices, Table, check_lengths, code_lengths, encode
from sclcore.export.huffman.decode import decode
from sclcore.export.huffman.native import Kernel, find_kernel
from sclcore.export.values import Bits, bits_of, tensor_of

MOST_VALUES = 1 << 16
"""Different values above which no code is made: their dictionary alone would be the larger part."""


@dataclass(frozen=True)
class Stream:
    """`count` values of type `dtype` as codewords; `values` [k] and `lengths` [k] by codeword."""

    dtype: torch.dtype
    count: int
    values: Bits
    lengths: Indices
    bits: bytes

    @classmethod
    def of(cls, elements: Bits, dtype: torch.dtype) -> Stream:
        """Raises ExportError for more than `MOST_VALUES` different values."""
        values, index, counts = np.unique(elements, return_inverse=True, return_counts=True)
        if len(values) > MOST_VALUES:
            raise ExportError(f"it has {len(values):,} different values, too many for a code")
        order = np.argsort(-counts, kind="stable")
        lengths = code_lengths(counts[order])
        symbol = np.empty(len(order), np.int64)
        symbol[order] = np.arange(len(order))
        return cls(dtype, len(elements), values[order], lengths, encode(symbol[index], lengths))

    @classmethod
    def read(cls, sections: Sequence[bytes], dtype: torch.dtype, count: int) -> Stream:
        """From what `sections` gave. Raises ExportError where that is no code."""
        values = np.frombuffer(sections[0], f"<u{dtype.itemsize}")
        per_length = np.frombuffer(sections[1], positions.unsigned(len(values)))
        lengths = np.repeat(np.arange(len(per_length)), per_length)
        if len(lengths) != len(values):
            raise ExportError("its codewords are not as many as its values")
        check_lengths(lengths)
        return cls(dtype, count, values, lengths, sections[2])

    def sections(self) -> list[bytes]:
        """The values, how many codewords have 0, 1, 2, … bits, the codewords."""
        per_length = np.bincount(self.lengths).astype(positions.unsigned(len(self.values)))
        return [self.values.tobytes(), per_length.tobytes(), self.bits]

    def blocks(self) -> Iterator[Bits]:
        """The values in their order, a few thousand at a time. Raises as `decode` does."""
        for symbols in decode(self.bits, self.lengths, self.count):
            yield self.values[symbols]

    def kernel(self, x: Tensor) -> Kernel | None:
        """What multiplies by the stream in C, if that can be: float32 on the CPU, two values."""
        fits = x.dtype == self.dtype == torch.float32 and x.device.type == "cpu"
        return find_kernel() if fits and len(self.values) > 1 else None

    def table(self) -> Tensor:
        """The values [k] by codeword."""
        return tensor_of(self.values, self.dtype, self.values.shape)

    def all(self) -> Bits:
        return np.concatenate([np.zeros(0, self.values.dtype), *self.blocks()])


@dataclass(frozen=True)
class Ham:
    """A weight of `shape` [out, ...] in the HAM format."""

    shape: torch.Size
    stream: Stream

    @classmethod
    def of(cls, weight: Tensor) -> Ham:
        """Raises ExportError where `weight` has too many different values."""
        return cls(weight.shape, Stream.of(bits_of(weight), weight.dtype))

    @classmethod
    def read(cls, sections: Sequence[bytes], dtype: torch.dtype, shape: torch.Size) -> Ham:
        return cls(shape, Stream.read(sections, dtype, math.prod(shape)))

    def sections(self) -> list[bytes]:
        return self.stream.sections()

    def dense(self) -> Tensor:
        """The weight, bit for bit. Raises ExportError where the stream does not hold it."""
        return tensor_of(self.stream.all(), self.stream.dtype, tuple(self.shape))

    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ, [..., out] for `x` [..., in], with the dense values of few features at a time."""
        out, inputs = _matrix(self.shape, x)
        columns = x.reshape(-1, inputs).T
        if kernel := self.stream.kernel(x):
            code = self.stream.bits, Table(self.stream.lengths), self.stream.table()
            product = kernel.ham(*code, out, columns)
        else:
            product, done = columns.new_zeros(out, columns.shape[1]), 0
            for elements in _whole(self.stream.blocks(), inputs):
                features = tensor_of(elements, self.stream.dtype, (len(elements) // inputs, inputs))
                product[done : done + len(features)] = features.to(x.dtype) @ columns
                done += len(features)
        return product.T.reshape(*x.shape[:-1], out)


@dataclass(frozen=True)
class Sham:
    """A weight of `shape` [out, ...] in the sHAM format: `counts` [out] live weights in each row
    of out × fan-in, and the column of each, `columns` [live], in narrow unsigned types."""

    shape: torch.Size
    counts: NDArray[Any]
    columns: NDArray[Any]
    stream: Stream

    @classmethod
    def of(cls, weight: Tensor) -> Sham:
        """Raises ExportError where `weight` has too many different values."""
        bits = bits_of(weight)
        live = np.flatnonzero(bits)
        code = positions.csr_code(live, len(bits), weight.shape[0])
        stream = Stream.of(bits[live], weight.dtype)
        return cls(weight.shape, *_narrow(code, weight.shape), stream)

    @classmethod
    def read(cls, sections: Sequence[bytes], dtype: torch.dtype, shape: torch.Size) -> Sham:
        """Raises ExportError where the sections do not fit each other or `shape`."""
        code = list(sections[3:])
        live = positions.read_csr(code, math.prod(shape), shape[0])
        columns = _narrow(code, shape)[1]
        if bool((np.diff(live) <= 0).any()) or columns.max(initial=0) >= math.prod(shape[1:]):
            raise ExportError("its columns do not rise within its rows")
        stream = Stream.read(sections[:3], dtype, len(live))
        return cls(shape, *_narrow(code, shape), stream)

    def sections(self) -> list[bytes]:
        """Those of the stream; how many values each row has; the column of each."""
        return [*self.stream.sections(), self.counts.tobytes(), self.columns.tobytes()]

    def dense(self) -> Tensor:
        """The weight, bit for bit. Raises ExportError where the stream does not hold it."""
        elements = self.stream.all()
        dense = np.zeros((self.shape[0], math.prod(self.shape[1:])), elements.dtype)
        dense[self._rows(), self.columns] = elements
        return tensor_of(dense.reshape(-1), self.stream.dtype, tuple(self.shape))

    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ, [..., out] for `x` [..., in]: one product for each live weight."""
        out, inputs = _matrix(self.shape, x)
        columns = x.reshape(-1, inputs).T
        if kernel := self.stream.kernel(x):
            code = self.stream.bits, Table(self.stream.lengths), self.stream.table()
            product = kernel.sham(*code, self.counts, self.columns, columns)
        else:
            product, done, rows = columns.new_zeros(out, columns.shape[1]), 0, self._rows()
            for elements in self.stream.blocks():
                block = slice(done, done + len(elements))
                weights = tensor_of(elements, self.stream.dtype, (len(elements), 1)).to(x.dtype)
                read = columns[torch.from_numpy(self.columns[block].astype(np.int64))]
                product.index_add_(0, torch.from_numpy(rows[block]), weights * read)
                done += len(elements)
        return product.T.reshape(*x.shape[:-1], out)

    def _rows(self) -> Indices:
        return np.repeat(np.arange(self.shape[0]), self.counts)


Matrix = Ham | Sham
FORMS: dict[str, type[Ham] | type[Sham]] = {"ham": Ham, "sham": Sham}


def _narrow(code: Sequence[bytes], shape: torch.Size) -> tuple[NDArray[Any], NDArray[Any]]:
    fan_in = math.prod(shape[1:])
    counts = np.frombuffer(code[0], positions.unsigned(fan_in))
    return counts, np.frombuffer(code[1], positions.unsigned(fan_in - 1))


def _matrix(shape: torch.Size, x: Tensor) -> tuple[int, int]:
    if len(shape) != 2 or x.shape[-1:] != shape[1:]:
        raise ValueError(f"a weight {tuple(shape)} takes no input {tuple(x.shape)}")
    return shape[0], shape[1]


def _whole(blocks: Iterator[Bits], width: int) -> Iterator[Bits]:
    """The same elements in blocks that are whole multiples of `width`."""
    parts: list[Bits] = []
    held = 0
    for block in blocks:
        parts.append(block)
        held += len(block)
        if held >= width:
            joined = np.concatenate(parts)
            whole = held // width * width
            yield joined[:whole]
            parts, held = [joined[whole:]], held - whole
