"""How large a model is as a file: dense, deflated, compact, coded, and what bounds promise."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sclcore.export.compact import Entry
from sclcore.export.huffman.file import CodedEntry
from sclcore.export.huffman.sizes import Counts, ham_bound, sham_bound
from sclcore.export.values import entropy_bits

_BITS = {"float16": 16, "int8": 8}


@dataclass(frozen=True)
class Size:
    """A row of the table. `positions` and `values` are shares of `bytes`, where they are known."""

    what: str
    bytes: int
    positions: int | None = None
    values: int | None = None


def dense_sizes(dense: Path) -> list[Size]:
    """Of a file with all elements: as it is, and as gzip -9 makes it."""
    return [Size("dense", dense.stat().st_size), Size("dense, gzip", _gzipped(dense))]


def compact_sizes(
    compact: Path, entries: Sequence[Entry], state: Mapping[str, Tensor]
) -> list[Size]:
    """Of a compact file, with the `entries` of its header, and of what no code is below."""
    positions = sum(_positions(entry) for entry in entries)
    values = sum(abs(size) for entry in entries for size in entry.sections) - positions
    return [
        Size("compact", compact.stat().st_size, positions, values),
        _bound(entries, state),
    ]


def coded_sizes(
    form: str, coded: Path, entries: Sequence[CodedEntry], state: Mapping[str, Tensor]
) -> list[Size]:
    """Of a HAM or sHAM file, with the `entries` of its header, and what its formula promises."""
    # Those of sHAM's indices come after the three of the codewords.
    positions = sum(sum(entry.sections[3:]) for entry in entries)
    values = sum(sum(entry.sections) for entry in entries) - positions
    bounds = [coded_bound(entry, state[entry.name]) for entry in entries]
    return [
        Size(form, coded.stat().st_size, positions, values),
        Size(f"{form}, bound by formula", round(sum(bounds))),
    ]


def coded_bound(entry: CodedEntry, tensor: Tensor) -> float:
    """Bytes that a tensor takes at most, without the file's header."""
    bounds = {"ham": ham_bound, "sham": sham_bound}
    if entry.form not in bounds:
        return tensor.numel() * tensor.element_size()
    return bounds[entry.form](Counts.of(tensor)) * tensor.numel() * 4


def _positions(entry: Entry) -> int:
    sections = {"all": 0, "mask": 1}.get(entry.positions, 2)
    return sum(abs(size) for size in entry.sections[:sections])


def _bound(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> Size:
    """Positions at n · H(p) bits a tensor, and the live values as they are, without any code."""
    positions = values = 0.0
    for entry in entries:
        tensor = state[entry.name]
        bits = _BITS.get(entry.values, 8 * tensor.element_size())
        # One scale in float32 for each feature.
        scales = 32 * tensor.shape[entry.axis] if entry.values == "int8" else 0
        positions += entropy_bits(tensor.numel(), entry.live)
        values += bits * entry.live + scales
    parts = round(positions / 8), round(values / 8)
    return Size("entropy bound", sum(parts), *parts)


def _gzipped(path: Path) -> int:
    """Bytes that gzip -9 makes of the file."""
    coder = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("rb") as file:
        size = sum(len(coder.compress(part)) for part in iter(lambda: file.read(1 << 20), b""))
    return size + len(coder.flush())
