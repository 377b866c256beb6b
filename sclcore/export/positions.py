"""Which elements of a tensor are not zero, in as few bytes as a plain reader can decode.

Three codes of the same positions (of `count` live elements among `size`, in row-major order):

- `mask`: one bit an element, most significant bit first;
- `csr`: how many are live in each of the `rows`, then the column of each;
- `rice`: the gaps g between live elements (0 for neighbours) in Golomb-Rice code: all quotients
  g >> k in unary (that many zeros, then a one), then all remainders of k bits, low bit first.
  Source: Rice and Plaunt, IEEE Trans. Communications 19 (1971) 889; Golomb, IEEE Trans.
  Information Theory 12 (1966) 399.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sclcore.export.files import ExportError

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]
_LARGEST_K = 40


def mask_code(live: Indices, size: int) -> list[bytes]:
    mask = np.zeros(size, dtype=bool)
    mask[live] = True
    return [np.packbits(mask).tobytes()]


def read_mask(code: list[bytes], size: int) -> Indices:
    return np.flatnonzero(np.unpackbits(_bytes(code[0]), count=size))


def csr_code(live: Indices, size: int, rows: int) -> list[bytes]:
    columns = size // rows
    counts = np.bincount(live // columns, minlength=rows)
    return [
        counts.astype(unsigned(columns)).tobytes(),
        (live % columns).astype(unsigned(columns - 1)).tobytes(),
    ]


def read_csr(code: list[bytes], size: int, rows: int) -> Indices:
    columns = size // rows
    counts = np.frombuffer(code[0], unsigned(columns)).astype(np.int64)
    column = np.frombuffer(code[1], unsigned(columns - 1)).astype(np.int64)
    if len(counts) != rows or counts.sum() != len(column):
        raise ExportError("the row counts do not fit the column indices")
    return np.repeat(np.arange(rows) * columns, counts) + column


def rice_code(live: Indices) -> tuple[int, list[bytes]]:
    """(k, code) with the k that takes the fewest bits."""
    gaps = np.diff(live, prepend=-1) - 1
    k = _best_k(gaps)
    ends = np.cumsum((gaps >> k) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=bool)
    unary[ends - 1] = True
    remainders = (gaps[:, None] >> np.arange(k)) & 1
    return k, [np.packbits(unary).tobytes(), np.packbits(remainders.astype(bool)).tobytes()]


def read_rice(code: list[bytes], k: int, count: int) -> Indices:
    if not 0 <= k <= _LARGEST_K:
        raise ExportError(f"a Rice parameter of {k} is none")
    ends = np.flatnonzero(np.unpackbits(_bytes(code[0])))
    bits = np.unpackbits(_bytes(code[1]))
    if len(ends) != count or len(code[1]) != (count * k + 7) // 8:
        raise ExportError("the gaps are not as many as the values")
    quotients = np.diff(ends, prepend=-1) - 1
    remainders = bits[: count * k].reshape(count, k) @ (1 << np.arange(k, dtype=np.int64))
    return np.cumsum((quotients << k) + remainders.astype(np.int64) + 1) - 1


def unsigned(largest: int) -> np.dtype:
    """The narrowest little-endian unsigned type that holds `largest`."""
    for width in (1, 2, 4):
        if largest < 1 << (8 * width):
            return np.dtype(f"<u{width}")
    return np.dtype("<u8")


def _best_k(gaps: Indices) -> int:
    best, bits = 0, None
    for k in range(_LARGEST_K):
        needed = len(gaps) * (k + 1) + int((gaps >> k).sum())
        # The sum of both terms is convex in k.
        if bits is not None and needed >= bits:
            break
        best, bits = k, needed
    return best


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)
