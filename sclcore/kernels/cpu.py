"""The fused step on CPUs: one walk through memory per pass (`cpu.c`), shared between threads.

The second pass rounds like `sclcore.kernels.reference`, operation by operation, on CPUs with fused
multiply-add; only softplus may differ in the last bit, by its exponential. The first pass adds up
squares in another order, so divisors may differ in the last bit, and what follows from them. Its
results depend neither on the number of threads nor on which vectors the CPU has.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sclcore.kernels import compiler
from sclcore.kernels.options import RATES, Options
from sclcore.kernels.proxies import LEAKY_SLOPE
from sclcore.kernels.reference import COUNTS
from sclcore.layout.piece import Piece

_PROXIES = ("identity", "leaky_relu", "softplus", "relu", "clipped")
# Below this many weights a second thread takes longer to start than it saves.
_WEIGHTS_PER_THREAD = 2**17


class _Piece(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "param", "weight", "mask")),
        *((name, ctypes.c_void_p) for name in ("momentum", "mask_momentum")),
        *((name, ctypes.c_int64) for name in ("begin", "length", "run", "head")),
        *((name, ctypes.c_int64) for name in ("first_run", "span", "features", "offset")),
        ("price", ctypes.c_float),
    )


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in (*RATES, "leaky_slope")),
        *((name, ctypes.c_int32) for name in ("nesterov", "proxy", "root")),
    )


class CpuKernel:
    """`sclcore.kernels.Kernel` in compiled C. Raises OSError where it cannot be compiled."""

    def __init__(self) -> None:
        library = compiler.load(Path(__file__).with_name("cpu.c"))
        span = (ctypes.c_int64, ctypes.c_int64)
        shared = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *span)
        self._sums, self._update = library.scl_sums, library.scl_update
        self._sums.argtypes = (*shared, ctypes.c_void_p)
        self._update.argtypes = (*shared, ctypes.c_void_p, ctypes.c_void_p)
        self._low, self._lower = library.scl_low, library.scl_lower
        rows = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)
        self._low.argtypes = (*rows, *span, ctypes.c_void_p, ctypes.c_void_p)
        pointer = ctypes.c_void_p
        self._lower.argtypes = (*rows, ctypes.c_float, pointer, *span, pointer)
        for function in (self._sums, self._update, self._low, self._lower):
            function.restype = None

    def sums(
        self, pieces: Sequence[Piece], grads: Sequence[Tensor], options: Sequence[Options]
    ) -> Tensor:
        grads = [grad.contiguous() for grad in grads]
        runs = [piece.runs for piece in pieces]
        table, settings = _table(pieces, grads, options, runs), _settings(options[0])
        found = torch.empty(sum(runs))

        def work(_: int, begin: int, end: int) -> None:
            self._sums(table, len(table), ctypes.byref(settings), begin, end, found.data_ptr())

        _share(work, _threads(pieces), pieces)
        if not any(piece.tensor.transposed_groups for piece in pieces):
            return found
        parts = zip(pieces, found.split(runs), strict=True)
        return torch.cat([piece.by_feature(part) for piece, part in parts])

    def update(
        self,
        pieces: Sequence[Piece],
        grads: Sequence[Tensor],
        options: Sequence[Options],
        divisors: Tensor,
    ) -> Tensor:
        grads, divisors = [grad.contiguous() for grad in grads], divisors.contiguous()
        features = [piece.features for piece in pieces]
        table, settings = _table(pieces, grads, options, features), _settings(options[0])

        def walk(begin: int, end: int, counts: int) -> None:
            shared = (table, len(table), ctypes.byref(settings), begin, end)
            self._update(*shared, divisors.data_ptr(), counts)

        return _written(pieces, table, walk)

    def low(self, pieces: Sequence[Piece], bound: float) -> tuple[list[Tensor], Tensor]:
        """As the reference's, but for their order."""
        table, threads = _rows(pieces), _threads(pieces)
        buffer = torch.empty(sum(piece.length for piece in pieces), dtype=torch.int32)
        found = torch.zeros(threads, len(pieces), 2, dtype=torch.int64)
        starts = [0] * threads

        def work(thread: int, begin: int, end: int) -> None:
            starts[thread] = begin
            mine = found[thread].data_ptr()
            self._low(table, len(table), bound, begin, end, buffer.data_ptr(), mine)

        _share(work, threads, pieces)
        numbers = found[:, :, 0].tolist()
        keys = []
        for i, row in enumerate(table):
            parts = ((max(starts[t], row.begin), numbers[t][i]) for t in range(threads))
            keys.append(torch.cat([buffer[at : at + n] for at, n in parts if n] or [buffer[:0]]))
        return keys, found[:, :, 1].sum(0)

    def lower(
        self, pieces: Sequence[Piece], before: Sequence[Tensor], distance: float, restart: float
    ) -> Tensor:
        """As the reference's."""
        table, was = _rows(pieces), torch.cat([*before])

        def walk(begin: int, end: int, counts: int) -> None:
            shared = (table, len(table), distance, restart, was.data_ptr(), begin, end)
            self._lower(*shared, counts)

        return _written(pieces, table, walk)


def _rows(pieces: Sequence[Piece]) -> ctypes.Array[_Piece]:
    """One row per piece, of what a walk without gradients needs."""
    rows, begin = [], 0
    for piece in pieces:
        rows.append(
            _Piece(
                param=piece.param.data_ptr(),
                weight=piece.weight.data_ptr(),
                mask=piece.mask.data_ptr(),
                mask_momentum=piece.mask_momentum.data_ptr(),
                begin=begin,
                length=piece.length,
            )
        )
        begin += piece.length
    return (_Piece * len(rows))(*rows)


def _table(
    pieces: Sequence[Piece], grads: Sequence[Tensor], options: Sequence[Options], sizes: list[int]
) -> ctypes.Array[_Piece]:
    """`_rows` with all that a step needs.

    `sizes` says how much of the vector over all pieces belongs to each.
    """
    table, offset = _rows(pieces), 0
    for row, piece, grad, settings, size in zip(table, pieces, grads, options, sizes, strict=True):
        tensor = piece.tensor
        recurring = bool(tensor.transposed_groups)
        inner = tensor.shape[1] if recurring else 1
        inputs = tensor.shape[0] // tensor.transposed_groups if recurring else 1
        row.grad = grad.data_ptr()
        row.momentum = None if piece.momentum is None else piece.momentum.data_ptr()
        row.run, row.head = tensor.run, piece.start % tensor.run
        row.first_run = piece.first_run if recurring else 0
        row.span, row.features = inputs * inner, inner
        row.offset, row.price = offset, settings.price
        offset += size
    return table


def _settings(options: Options) -> _Settings:
    return _Settings(
        **{name: getattr(options, name) for name in RATES},
        leaky_slope=LEAKY_SLOPE,
        nesterov=options.nesterov,
        proxy=_PROXIES.index(options.proxy),
        root=options.mask_gradient == "root",
    )


def _written(
    pieces: Sequence[Piece], table: ctypes.Array[_Piece], walk: Callable[[int, int, int], None]
) -> Tensor:
    """What a walk that writes the parameters counts [pieces, COUNTS].

    `walk(begin, end, counts)` is called for each stretch of all weights, with where to count.
    """
    narrow, threads = _narrow_params(pieces, table), _threads(pieces)
    counts = torch.zeros(threads, len(pieces), COUNTS, dtype=torch.int64)

    def work(thread: int, begin: int, end: int) -> None:
        walk(begin, end, counts[thread].data_ptr())

    _share(work, threads, pieces)
    for piece, values in narrow:
        piece.param.copy_(values)
    _announce(pieces)
    return counts.sum(0)


def _narrow_params(
    pieces: Sequence[Piece], table: ctypes.Array[_Piece]
) -> list[tuple[Piece, Tensor]]:
    """Buffers in float32 for the parameters that have less; the rows of `table` are set to them."""
    narrow = []
    for piece, row in zip(pieces, table, strict=True):
        if piece.param.dtype != torch.float32:
            buffer = torch.empty(piece.length)
            row.param = buffer.data_ptr()
            narrow.append((piece, buffer))
    return narrow


def _announce(pieces: Sequence[Piece]) -> None:
    """What PyTorch cannot know: the parameters have changed, and what else shows them."""
    # A backward through what they were must fail, as it does after any step in place.
    increment_version([piece.param for piece in pieces])
    for piece in pieces:
        if piece.target is not None:
            piece.target.copy_(piece.param.view(piece.target.shape))


def _threads(pieces: Sequence[Piece]) -> int:
    weights = sum(piece.length for piece in pieces)
    return min(torch.get_num_threads(), math.ceil(weights / _WEIGHTS_PER_THREAD))


def _share(work: Callable[[int, int, int], None], threads: int, pieces: Sequence[Piece]) -> None:
    """Call `work(thread, begin, end)` for equal stretches of all weights, at the same time.

    The compiled code runs without the lock of the interpreter. No pool is kept: it would not
    survive a fork, and starting a thread takes less than a tenth of a millisecond.
    """
    weights = sum(piece.length for piece in pieces)
    bounds = [weights * thread // threads for thread in range(threads + 1)]
    spans = [(thread, bounds[thread], bounds[thread + 1]) for thread in range(threads)]
    others = [Thread(target=work, args=span) for span in spans[1:]]
    for other in others:
        other.start()
    work(*spans[0])
    for other in others:
        other.join()
