"""The values of a tensor's live elements: as they are, or rounded to float16 or int8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclcore.export.files import ExportError

PRECISIONS = ("float32", "float16", "int8")
"""float32: every tensor keeps its type and bits."""

Bits = NDArray[Any]


def bits_of(tensor: Tensor) -> Bits:
    """The elements of `tensor` in row-major order, as little-endian unsigned integers."""
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise ExportError(f"a tensor of type {tensor.dtype} has no place in a compact file")
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().view(f"<u{flat.element_size()}")


def tensor_of(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `bits_of` was given."""
    if not len(bits):
        return torch.zeros(shape, dtype=dtype)
    data = torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8).copy())
    return data.view(dtype).reshape(shape)


def planes_of(bits: Bits) -> list[bytes]:
    """All lowest bytes, then all second ones, …: exponents beside exponents, which deflate well."""
    width = bits.dtype.itemsize
    planes = bits.view(np.uint8).reshape(-1, width)
    return [planes[:, byte].tobytes() for byte in range(width)]


def bits_of_planes(planes: list[bytes]) -> Bits:
    stacked = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1)
    return np.ascontiguousarray(stacked).view(f"<u{len(planes)}").reshape(-1)


def rounded(weight: Tensor, precision: str, axis: int = 0) -> Tensor:
    """What a compact file of `precision` gives back for `weight`, in the type of `weight`.

    int8 is round(w / s) · s with one scale s = max|w| / 127 for each feature, which are the
    slices along `axis`. Raises ExportError where a value has no such neighbour.
    """
    if precision == "float32":
        return weight
    if precision == "float16":
        return _to_float16(weight).to(weight.dtype)
    quantised, scales = to_int8(weight, axis)
    return from_int8(quantised, scales, axis).to(weight.dtype)


def half_bits(weight: Tensor) -> Bits:
    return bits_of(_to_float16(weight))


def to_int8(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(values int8 of the shape of `weight`, scales float32 of the features)."""
    if not bool(torch.isfinite(weight).all()):
        raise ExportError("it holds values that are not finite, which int8 has no room for")
    others = [d for d in range(weight.ndim) if d != axis]
    single = weight.detach().float()
    largest = single.abs().amax(others) if others else single.abs()
    scales = largest / 127
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    scaled = single / _along(divisor, axis, weight.ndim)
    return scaled.round().clamp(-127, 127).to(torch.int8), scales


def from_int8(quantised: Tensor, scales: Tensor, axis: int) -> Tensor:
    return quantised.float() * _along(scales, axis, quantised.ndim)


def _to_float16(weight: Tensor) -> Tensor:
    half = weight.detach().half()
    if not torch.equal(torch.isfinite(half), torch.isfinite(weight)):
        raise ExportError("it holds values beyond 65504, the largest of float16")
    return half


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def entropy_bits(size: int, live: int) -> float:
    """size · H(live / size): bits that the positions of `live` among `size` elements take at least.

    H(p) = −p log₂ p − (1 − p) log₂(1 − p): Shannon's bound for connections that are live
    independently of each other, all with the same probability.
    """
    return sum(-n * math.log2(n / size) for n in (live, size - live) if n)
