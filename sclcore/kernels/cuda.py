"""The fused step on GPUs: one Triton launch per pass, however many tensors there are.

What does not change from step to step — where state lies, how it is cut into the parts that one
program of a kernel treats — is kept on the device in tables, made once per list of pieces. Each
call uploads one small tensor, and waits for nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from os import environ
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sclcore.kernels import triton_kernels
from sclcore.kernels.options import RATES, Options
from sclcore.kernels.proxies import LEAKY_SLOPE
from sclcore.kernels.reference import COUNTS
from sclcore.layout.piece import Piece

_PRECISIONS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class _Tables:
    """A list of pieces, as the kernels need it."""

    owners: tuple[ReferenceType[Piece], ...]
    pieces: Tensor
    """One row per piece: `triton_kernels` names the columns."""
    tiles: Tensor
    """(piece, number of the tile in it) of each program of the first pass."""
    chunks: Tensor
    """(piece, number of the chunk in it) of each program of the second pass."""
    runs: list[int]

    def describes(self, pieces: Sequence[Piece]) -> bool:
        same = (owner() is piece for owner, piece in zip(self.owners, pieces, strict=False))
        return len(self.owners) == len(pieces) and all(same)


class CudaKernel:
    """`sclcore.kernels.Kernel` in Triton. Raises OSError where Triton cannot work on `device`."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            _check(device)
        # By the first piece: what the optimizer holds comes in few lists, whose tables live and
        # die with it.
        self._tables: WeakKeyDictionary[Piece, _Tables] = WeakKeyDictionary()

    def sums(
        self, pieces: Sequence[Piece], grads: Sequence[Tensor], options: Sequence[Options]
    ) -> Tensor:
        tables, grads = self._describe(pieces), [grad.contiguous() for grad in grads]
        found = grads[0].new_empty(sum(tables.runs))
        addresses = torch.tensor([grad.data_ptr() for grad in grads])
        gradients = _upload(addresses, found.device)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(found):
            triton_kernels.sums[(len(tables.tiles),)](
                tables.tiles, tables.pieces, gradients, found, **_constants(options[0])
            )
        if not any(piece.tensor.transposed_groups for piece in pieces):
            return found
        parts = zip(pieces, found.split(tables.runs), strict=True)
        return torch.cat([piece.by_feature(part) for piece, part in parts])

    def update(
        self,
        pieces: Sequence[Piece],
        grads: Sequence[Tensor],
        options: Sequence[Options],
        divisors: Tensor,
    ) -> Tensor:
        tables, grads = self._describe(pieces), [grad.contiguous() for grad in grads]
        addresses = [grad.data_ptr() for grad in grads]
        # One message: float32 in pairs beside the addresses, with one to spare for an odd number.
        prices = torch.tensor([*(o.price for o in options), *[0.0] * (len(pieces) % 2)])
        packed = prices.to(torch.float32).view(torch.int64)
        changing = _upload(torch.cat([torch.tensor(addresses), packed]), divisors.device)
        gradients, prices = changing[: len(pieces)], changing[len(pieces) :].view(torch.float32)
        counts = torch.zeros(len(pieces), COUNTS, dtype=torch.int64, device=divisors.device)
        common = options[0]
        rates: list[Any] = [float(getattr(common, name)) for name in RATES]
        constants = _constants(common, NESTEROV=bool(common.nesterov), LEARNS=bool(common.mask_lr))
        with torch.cuda.device_of(counts):
            triton_kernels.update[(len(tables.chunks),)](
                tables.chunks,
                tables.pieces,
                gradients,
                prices,
                divisors.contiguous(),
                counts,
                *rates,
                **constants,
            )
        # PyTorch cannot know it: a backward through what the parameters were must fail.
        increment_version([piece.param for piece in pieces])
        for piece in pieces:
            if piece.target is not None:
                piece.target.copy_(piece.param.view(piece.target.shape))
        return counts

    def _describe(self, pieces: Sequence[Piece]) -> _Tables:
        known = self._tables.get(pieces[0])
        if known is None or not known.describes(pieces):
            known = self._tables[pieces[0]] = _tables(pieces)
        return known


def _constants(options: Options, **more: bool) -> dict[str, Any]:
    """What each compiled variant of a kernel has built in, and how it is compiled."""
    # Without fusion each operation rounds as it is written: see `triton_kernels`.
    launch = {"num_warps": 4, "enable_fp_fusion": False}
    built_in = {
        "PROXY": options.proxy,
        "LEAKY_SLOPE": LEAKY_SLOPE,
        "ROOT": options.mask_gradient == "root",
    }
    return {**built_in, **more, **launch}


def _check(device: torch.device) -> None:
    """OSError where Triton has no code for the GPU, or nothing to build its launcher with."""
    oldest = (7, 5)
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < oldest:
        raise OSError(f"Triton needs compute capability {oldest}, this GPU has {found}")
    if not environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        raise OSError("Triton needs a C compiler, and none was found (gcc or clang)")


def _tables(pieces: Sequence[Piece]) -> _Tables:
    """Made on the host and copied at once; the only time that anything is waited for."""
    device, runs = pieces[0].weight.device, [piece.runs for piece in pieces]
    widths = [_width(piece.tensor.run) for piece in pieces]
    rows, sums, divisors = [], 0, 0
    for piece, width in zip(pieces, widths, strict=True):
        rows.append([*_addresses(piece), *_shape(piece), sums, divisors, *_kinds(piece, width)])
        sums, divisors = sums + piece.runs, divisors + piece.features
    per_tile = [triton_kernels.BLOCK // width for width in widths]
    return _Tables(
        owners=tuple(map(ref, pieces)),
        pieces=torch.tensor(rows, device=device),
        tiles=_programs(runs, per_tile).to(device),
        chunks=_programs([p.length for p in pieces], [triton_kernels.BLOCK] * len(pieces)).to(
            device
        ),
        runs=runs,
    )


def _width(run: int) -> int:
    """Elements of a run that are read at a time: few of them idle, and no loop is very long."""
    short, middle, long = triton_kernels.WIDTHS
    return short if run <= 4 * short else middle if run <= 8 * middle else long


def _addresses(piece: Piece) -> list[int]:
    """Of the parameter and its state; 0: there is no momentum."""
    momentum = 0 if piece.momentum is None else piece.momentum.data_ptr()
    mask_momentum = piece.mask_momentum.data_ptr()
    return [
        piece.param.data_ptr(),
        piece.weight.data_ptr(),
        piece.mask.data_ptr(),
        momentum,
        mask_momentum,
    ]


def _shape(piece: Piece) -> list[int]:
    """Length, run, elements of the first run that others hold; then how features recur in runs."""
    tensor = piece.tensor
    lengths = [piece.length, tensor.run, piece.start % tensor.run]
    if not tensor.transposed_groups:
        return [*lengths, 0, 1, 1]
    inputs, inner = tensor.shape[0] // tensor.transposed_groups, tensor.shape[1]
    return [*lengths, piece.first_run, inputs * inner, inner]


def _kinds(piece: Piece, width: int) -> list[int]:
    return [_PRECISIONS[piece.param.dtype], width]


def _programs(sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """(piece, number of the part in it) of each part, pieces of `sizes` being cut by `steps`."""
    counts = torch.tensor([-(-size // step) for size, step in zip(sizes, steps, strict=True)])
    piece = torch.arange(len(sizes)).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[piece]
    return torch.stack([piece, torch.arange(len(piece)) - before], 1)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Pinned, or the host would wait; the allocator keeps the memory until it has been read."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
