"""Canonical Huffman code: from counts to codewords, from symbols to bits.

Symbols are numbered 0 … k − 1 from the most frequent to the rarest, so that a code is nothing but
the lengths of its codewords, which never fall: the first codeword is 0, each next one is the one
before plus 1, lengthened by zeros. Source: Huffman, Proc. IRE 40 (1952) 1098; Schwartz and Kallick,
Comm. ACM 7 (1964) 166 (canonical form).
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from sclcore.export.files import ExportError

Indices = NDArray[np.int64]
LONGEST = 57
"""Bits of the longest codeword: eight bytes hold so many from any of their first eight bits on.
Fewer than 2^39 symbols never need more."""
_ENCODED_AT_ONCE = 1 << 18
ENDS_EARLY = "its stream ends before its last value"


def code_lengths(counts: Indices) -> Indices:
    """Bits of each symbol's codeword, int64 [k], for `counts` [k] > 0 that never rise.

    Σ counts · lengths is the least of all prefix codes. A single symbol takes no bits.
    """
    size = len(counts)
    if size < 2:
        return np.zeros(size, np.int64)
    heap = [(int(count), node) for node, count in enumerate(counts)]
    heapq.heapify(heap)
    parents = np.zeros(2 * size - 1, np.int64)
    for node in range(size, 2 * size - 1):
        (one, first), (other, second) = heapq.heappop(heap), heapq.heappop(heap)
        parents[[first, second]] = node
        heapq.heappush(heap, (one + other, node))
    depths = np.zeros(2 * size - 1, np.int64)
    for node in range(2 * size - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return np.sort(depths[:size])


def check_lengths(lengths: Indices) -> None:
    """ExportError unless every sequence of bits is one of codewords of these lengths."""
    if len(lengths) < 2:
        whole = not lengths.any()
    else:
        shortest, longest = int(lengths.min()), int(lengths.max())
        whole = shortest > 0 and longest <= LONGEST
        whole = whole and sum(1 << (longest - int(n)) for n in lengths) == 1 << longest
    if not whole or bool((np.diff(lengths) < 0).any()):
        raise ExportError("the lengths of its codewords make no code")


def encode(symbols: Indices, lengths: Indices) -> bytes:
    """The codewords of `symbols`, one after the other, the last byte filled up with zeros."""
    words, parts, left = _codewords(lengths), [], np.zeros(0, np.uint8)
    for at in range(0, len(symbols), _ENCODED_AT_ONCE):
        block = symbols[at : at + _ENCODED_AT_ONCE]
        bits = np.concatenate([left, _bits(words[block], lengths[block])])
        whole = len(bits) // 8 * 8
        parts.append(np.packbits(bits[:whole]).tobytes())
        left = bits[whole:]
    return b"".join([*parts, np.packbits(left).tobytes()])


def check_end(stream: bytes, at: int) -> None:
    """ExportError unless bit `at`, behind the last codeword, is in the last byte or behind it."""
    if at > 8 * len(stream):
        raise ExportError(ENDS_EARLY)
    if 8 * len(stream) - at >= 8:
        raise ExportError("its stream holds another number of values")


class Table:
    """What a codeword is recognised by: a row for each length that occurs, the shortest first."""

    def __init__(self, lengths: Indices) -> None:
        longest = int(lengths[-1])
        words = _codewords(lengths)
        self.lengths, self.first = np.unique(lengths, return_index=True)
        self.below = (longest - self.lengths).astype(np.uint64)
        aligned = words.astype(np.uint64) << (longest - lengths).astype(np.uint64)
        self.words = aligned[self.first]
        # The codewords of a row begin with less than `ends`, once all are filled up to the longest.
        self.ends = np.append(self.words[1:], np.uint64(1 << longest))
        self.shift = np.uint64(64 - longest)

    def symbols(self, windows: NDArray[np.uint64], rows: Indices) -> Indices:
        """What stands at the head of each window, whose codeword is of the length of its row."""
        beyond = (windows - self.words[rows]) >> self.below[rows]
        return self.first[rows] + beyond.astype(np.int64)


def _codewords(lengths: Indices) -> Indices:
    words = np.zeros(len(lengths), np.int64)
    word = 0
    for symbol in range(1, len(lengths)):
        word = (word + 1) << int(lengths[symbol] - lengths[symbol - 1])
        words[symbol] = word
    return words


def _bits(words: Indices, lengths: Indices) -> NDArray[np.uint8]:
    ends = np.cumsum(lengths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(lengths.max(initial=0))):
        # The place-th bit from the right, of those codewords that have one.
        has = lengths > place
        bits[ends[has] - 1 - place] = (words[has] >> place) & 1
    return bits
