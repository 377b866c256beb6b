"""Bits → symbols of a canonical Huffman code, a few thousand at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sclcore.export.files import ExportError
from sclcore.export.huffman.code import ENDS_EARLY, Indices, Table, check_end
from sclcore.export.huffman.native import find_kernel

_BLOCK_BYTES = 4096


def decode(stream: bytes, lengths: Indices, count: int) -> Iterator[Indices]:
    """The first `count` symbols of `stream`, a few thousand at a time.

    `lengths` have passed `check_lengths`. Raises ExportError where the stream ends before the last
    symbol, or goes on for more than the bits that fill up its last byte. In C where there is a
    compiler, unless SCL_FUSED is 0.
    """
    if len(lengths) < 2:
        if count and not len(lengths):
            raise ExportError("it has values, and no code for them")
        check_end(stream, 0)
        yield np.zeros(count, np.int64)
        return
    kernel = find_kernel()
    yield from (decode_plainly if kernel is None else kernel.symbols)(stream, Table(lengths), count)


def decode_plainly(stream: bytes, table: Table, count: int) -> Iterator[Indices]:
    """The same without C, for two symbols or more.

    Where a codeword ends, only reading it tells. So a block of the stream is read from each of its
    bits at once: what starts there is as long as the first bits say; from the true start, the true
    ones are then found by steps of 1, 2, 4, … codewords.
    """
    at, left = 0, count
    while left:
        first = at // 8
        if at >= 8 * len(stream):
            raise ExportError(ENDS_EARLY)
        block = np.frombuffer(stream[first : first + _BLOCK_BYTES + 7], np.uint8)
        windows = _windows(block, min(_BLOCK_BYTES, len(stream) - first)) >> table.shift
        rows = np.searchsorted(table.ends, windows, side="right")
        starts = _starts(table.lengths[rows], at % 8, left)
        yield table.symbols(windows[starts], rows[starts])
        at = 8 * first + int(starts[-1] + table.lengths[rows[starts[-1]]])
        left -= len(starts)
    check_end(stream, at)


def _windows(block: NDArray[np.uint8], size: int) -> NDArray[np.uint64]:
    """64 bits from each bit of the first `size` bytes on, [8 · size]; zeros beyond the block."""
    padded = np.zeros(size + 7, np.uint8)
    padded[: len(block)] = block[: size + 7]
    eights = np.lib.stride_tricks.sliding_window_view(padded, 8)
    words = np.ascontiguousarray(eights).view(">u8").astype(np.uint64)
    return (words << np.arange(8, dtype=np.uint64)).reshape(-1)


def _starts(lengths: Indices, start: int, most: int) -> Indices:
    """The places at which codewords begin: `start` and on, each as far as `lengths` says there."""
    end = len(lengths)
    jump = np.append(np.minimum(np.arange(end) + lengths, end), end)
    starts = np.array([start])
    while starts[-1] < end and len(starts) < most:
        starts = np.concatenate([starts, jump[starts]])
        jump = jump[jump]
    return starts[starts < end][:most]
