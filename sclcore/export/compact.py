"""One small file for a sparse model: positions and values of what is not zero, exactly decodable.

The frame is that of sclcore/export/container.py, with b"SCLSPARS" at its head; docs/export.md says
the format, version 1, in full. A reader needs zlib, JSON and the three codes of
sclcore/export/positions.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclcore.export import positions
from sclcore.export.container import Kind, packed, unpacked
from sclcore.export.files import ExportError, same_bits, staged
from sclcore.export.values import (
    PRECISIONS,
    bits_of,
    bits_of_planes,
    from_int8,
    half_bits,
    planes_of,
    rounded,
    tensor_of,
    to_int8,
)

_KIND = Kind(b"SCLSPARS", 1, "compact file")


@dataclass(frozen=True)
class Entry:
    """One tensor of the header.

    `positions`: all, mask, csr or rice; `live`: how many elements have a value in the file;
    `values`: the type of the tensor, or the float16 or int8 it was rounded to; `sections`: stored
    bytes of each, negative where deflated. The scales of int8 are the section before the values.
    """

    name: str
    dtype: str
    shape: list[int]
    positions: str
    live: int
    values: str
    sections: list[int]
    k: int = 0
    axis: int = 0


def save_compact(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    values: str = "float32",
    connections: Mapping[str, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """Write `state` as a compact file, read it back, compare, and only then rename it to `path`.

    With `values` float16 or int8 the tensors named by `connections` (name → the dimension that its
    output features lie along) are rounded; all others, and all of them under float32, come back
    bit for bit. Raises ValueError for other `values`, ExportError where a tensor cannot be written
    so or reads back differently; either leaves nothing behind.
    """
    if values not in PRECISIONS:
        raise ValueError(f"values must be one of {', '.join(PRECISIONS)}, not {values!r}")
    features = (connections or {}) if values != "float32" else {}
    coded = [_encode(name, tensor, values, features.get(name)) for name, tensor in state.items()]
    entries = [entry for entry, _ in coded]
    sections = [sections for _, sections in coded]
    content = packed(_KIND, [asdict(entry) for entry in entries], sections, metadata or {})
    with staged(path) as temporary:
        temporary.write_bytes(content)
        _verify(path.name, load_compact(temporary), state, values, features)
    return entries


def load_compact(path: Path | str) -> dict[str, Tensor]:
    """The state_dict in a compact file: dense tensors, for `load_state_dict`.

    Raises ExportError if it is none, from a newer version, or damaged.
    """
    path = Path(path)
    entries, _, sections = unpacked(_KIND, path, Entry)
    state = {}
    for entry, own in zip(entries, sections, strict=True):
        try:
            state[entry.name] = _decode(entry, own)
        except (ExportError, ValueError, IndexError, zlib.error) as error:
            raise ExportError(f"{path.name}: tensor {entry.name} is damaged: {error}") from error
    return state


def read_header(path: Path) -> tuple[list[Entry], dict[str, Any]]:
    """(entries, metadata) of a compact file; raises as `load_compact` does."""
    entries, metadata, _ = unpacked(_KIND, path, Entry)
    return entries, metadata


def _encode(name: str, tensor: Tensor, values: str, axis: int | None) -> tuple[Entry, list[bytes]]:
    bits = bits_of(tensor)
    live = np.flatnonzero(bits)
    rounds = axis is not None and tensor.is_floating_point()
    try:
        precision = values if rounds else _name(tensor.dtype)
        if rounds and values == "float16":
            leading, elements = [], half_bits(tensor)
        elif rounds:
            quantised, scales = to_int8(tensor, axis or 0)
            leading, elements = [bits_of(scales).tobytes()], bits_of(quantised)
        else:
            leading, elements = [], bits
    except ExportError as error:
        raise ExportError(f"{name} cannot be written as {values}: {error}") from None
    kind, k, code = _shortest(live, len(bits), tensor.shape)
    chosen = elements if kind == "all" else elements[live]
    stored = [_deflated(data) for data in [*code, *leading, *planes_of(chosen)]]
    entry = Entry(
        name=name,
        dtype=_name(tensor.dtype),
        shape=list(tensor.shape),
        positions=kind,
        live=len(chosen),
        values=precision,
        sections=[-len(data) if deflated else len(data) for data, deflated in stored],
        k=k,
        axis=axis or 0,
    )
    return entry, [data for data, _ in stored]


def _shortest(
    live: positions.Indices, size: int, shape: torch.Size
) -> tuple[str, int, list[bytes]]:
    """(code, k, its sections); `all` where nothing or hardly anything is zero."""
    if size == 0 or len(live) == size:
        return "all", 0, []
    k, rice = positions.rice_code(live)
    codes = {
        "mask": positions.mask_code(live, size),
        "csr": positions.csr_code(live, size, shape[0] if shape else 1),
        "rice": rice,
    }
    kind = min(codes, key=lambda kind: sum(len(_deflated(part)[0]) for part in codes[kind]))
    return kind, k if kind == "rice" else 0, codes[kind]


def _decode(entry: Entry, stored: list[bytes]) -> Tensor:
    size, dtype = math.prod(entry.shape), getattr(torch, entry.dtype)
    sections = [
        zlib.decompress(data) if length < 0 else data
        for data, length in zip(stored, entry.sections, strict=True)
    ]
    readers: dict[str, tuple[int, Callable[[list[bytes]], Any]]] = {
        "all": (0, lambda _: np.arange(size)),
        "mask": (1, lambda code: positions.read_mask(code, size)),
        "csr": (2, lambda code: positions.read_csr(code, size, (entry.shape or [1])[0])),
        "rice": (2, lambda code: positions.read_rice(code, entry.k, entry.live)),
    }
    if entry.positions not in readers:
        raise ExportError(f"it has positions of the unknown kind {entry.positions!r}")
    count, read = readers[entry.positions]
    live, rest = read(sections[:count]), sections[count:]
    scales = rest.pop(0) if entry.values == "int8" and entry.dtype != "int8" else None
    elements = bits_of_planes(rest)
    if len(elements) != len(live) or len(live) != entry.live or live[-1:].sum() >= max(size, 1):
        raise ExportError("it has another number of positions than of values")
    dense = np.zeros(size, elements.dtype)
    dense[live] = elements
    tensor = tensor_of(dense, getattr(torch, entry.values), tuple(entry.shape))
    if scales is not None:
        features = tensor_of(np.frombuffer(scales, "<u4"), torch.float32, (len(scales) // 4,))
        tensor = from_int8(tensor, features, entry.axis)
    return tensor.to(dtype)


def _deflated(data: bytes) -> tuple[bytes, bool]:
    """(what is stored, whether deflated): whichever is smaller."""
    small = zlib.compress(data, 6)
    return (small, True) if len(small) < len(data) else (data, False)


def _verify(
    name: str,
    read: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    values: str,
    features: Mapping[str, int],
) -> None:
    if list(read) != list(state):
        raise ExportError(f"{name} holds other tensors than the model")
    for key, tensor in state.items():
        expected = tensor.detach().cpu()
        if key in features and tensor.is_floating_point():
            expected = rounded(expected, values, features[key])
            # A rounded −0 and 0 are the same value; only 0 is left out of the file.
            same = torch.equal(read[key], expected)
        else:
            same = same_bits(read[key], expected)
        if not same:
            raise ExportError(f"{key} reads back with other values than were written")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
