"""Codewords read in C (`decode.c`), and products straight from them, where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclcore.export.files import ExportError
from sclcore.export.huffman.code import ENDS_EARLY, Indices, Table, check_end
from sclcore.kernels import compiler

_log = logging.getLogger(__name__)
_SYMBOLS_AT_ONCE = 1 << 16


class _Code(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_char_p),
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ends", "words", "first", "lengths")),
        ("longest", ctypes.c_int64),
    )


class Kernel:
    """The functions of decode.c. Raises OSError where it cannot be compiled."""

    def __init__(self) -> None:
        library = compiler.load(Path(__file__).with_name("decode.c"))
        code, pointer, number = ctypes.POINTER(_Code), ctypes.c_void_p, ctypes.c_int64
        self._symbols, self._ham = library.scl_symbols, library.scl_ham
        self._symbols.argtypes = (code, number, number, pointer)
        self._ham.argtypes = (code, pointer, number, number, number, pointer, pointer)
        self._sham = {width: getattr(library, f"scl_sham_{width}") for width in (1, 2, 4)}
        for function in self._sham.values():
            function.argtypes = (code, pointer, pointer, pointer, number, number, pointer, pointer)
        for function in (self._symbols, self._ham, *self._sham.values()):
            function.restype = number

    def symbols(self, stream: bytes, table: Table, count: int) -> Iterator[Indices]:
        """As `decode_plainly`."""
        code, at = _code(stream, table), 0
        for done in range(0, count, _SYMBOLS_AT_ONCE):
            block = np.empty(min(_SYMBOLS_AT_ONCE, count - done), np.int64)
            at = _after(self._symbols(ctypes.byref(code), at, len(block), block.ctypes.data))
            yield block
        check_end(stream, at)

    def ham(self, stream: bytes, table: Table, values: Tensor, out: int, x: Tensor) -> Tensor:
        """W x, float32 [out, batch], for `x` [in, batch]; W has a codeword for each element."""
        x, product = x.contiguous(), torch.zeros(out, x.shape[1])
        code = _code(stream, table)
        at = self._ham(
            ctypes.byref(code), values.data_ptr(), out, *x.shape, x.data_ptr(), product.data_ptr()
        )
        check_end(stream, _after(at))
        return product

    def sham(
        self,
        stream: bytes,
        table: Table,
        values: Tensor,
        counts: NDArray[np.unsignedinteger],
        columns: NDArray[np.unsignedinteger],
        x: Tensor,
    ) -> Tensor:
        """The same; W has a codeword for each of the `counts` of its rows, in these `columns`,
        which are below `in`."""
        x, product = x.contiguous(), torch.zeros(len(counts), x.shape[1])
        code, numbers = _code(stream, table), counts.astype(np.int64)
        at = self._sham[columns.dtype.itemsize](
            ctypes.byref(code),
            values.data_ptr(),
            numbers.ctypes.data,
            columns.ctypes.data,
            len(counts),
            x.shape[1],
            x.data_ptr(),
            product.data_ptr(),
        )
        check_end(stream, _after(at))
        return product


def find_kernel() -> Kernel | None:
    """None where C cannot be compiled; SCL_FUSED=0 turns it off."""
    return None if os.environ.get("SCL_FUSED") == "0" else _kernel()


@functools.cache
def _kernel() -> Kernel | None:
    try:
        return Kernel()
    except OSError as error:
        _log.warning("codewords are read by numpy, many times slower: %s", error)
        return None


def _code(stream: bytes, table: Table) -> _Code:
    """`stream` and the arrays of `table` must outlive it."""
    arrays = (table.ends, table.words, table.first, table.lengths)
    return _Code(stream, len(stream), *(a.ctypes.data for a in arrays), int(table.lengths[-1]))


def _after(at: int) -> int:
    if at < 0:
        raise ExportError(ENDS_EARLY)
    return at
