"""The native runtime's file: a network's steps, and its live weights in compact form.

The frame is that of sclcore/export/container.py, with b"SCLNATIV" at its head; docs/runtime.md says
the format, version 1, in full. Its one reader in C is c/load.c.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sclcore.export.container import Kind as Format
from sclcore.export.container import packed
from sclcore.export.native.steps import Network, Weights
from sclcore.export.positions import rice_code

_FORMAT = Format(b"SCLNATIV", 1, "file of scl export --format native")
_EVERY = -1
"""Instead of the parameter of a Rice code: every weight is there, and no position."""


@dataclass(frozen=True)
class Entry:
    """Of the header, which the runtime skips: the program, or the weights of one step."""

    name: str
    sections: list[int]
    shape: list[int]
    live: int


def save_network(network: Network, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `network`; nothing is read back here."""
    counts = (len(network.tensors), len(network.steps), network.source, network.out)
    program = _numbers(*counts, *(size for shape in network.tensors for size in shape))
    entries: list[Entry] = []
    bodies: list[list[bytes]] = []
    for step in network.steps:
        program += _numbers(step.kind, step.source, step.second, step.out, step.activation)
        program += struct.pack("<2f", step.low, step.high)
        windows = (*step.kernel, *step.stride, *step.dilation, *step.before)
        program += _numbers(*windows, step.groups)
        if step.bias is None:
            continue
        if step.weight is None:
            sections = [np.ascontiguousarray(step.bias, "<f4").tobytes()]
            entries.append(Entry(step.name, [len(sections[0])], list(step.bias.shape), 0))
            bodies.append(sections)
            continue
        numbers, sections = _coded(step.weight, step.bias)
        program += _numbers(*numbers)
        shape, live = list(step.weight.shape), numbers[0]
        entries.append(Entry(step.name, [len(s) for s in sections], shape, live))
        bodies.append(sections)
    entries.insert(0, Entry("program", [len(program)], [], 0))
    bodies.insert(0, [program])
    path.write_bytes(packed(_FORMAT, [asdict(entry) for entry in entries], bodies, metadata))


def _coded(weight: Weights, bias: Weights) -> tuple[list[int], list[bytes]]:
    """(numbers of the step's record, sections) of the live weights.

    Positions are in Rice code, and so is by how much each exponent is below the largest: weights
    of a layer are of one size, so that two or three bits say it. The other 24 bits follow as they
    are.
    """
    flat = weight.reshape(-1)
    live = np.flatnonzero(flat)
    k, positions = (_EVERY, [b"", b""]) if len(live) == len(flat) else rice_code(live)
    bits = flat[live].astype("<f4").view("<u4")
    exponents = (bits >> 23 & 255).astype(np.int64)
    top = int(exponents.max(initial=0))
    # A code of rising positions, the gaps between which are these numbers.
    exponent_k, below = rice_code(np.cumsum(top - exponents + 1) - 1)
    rest = (bits & 0x7FFFFF) | (bits >> 31 << 23)
    mantissas = rest.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    lengths = [len(section) for section in (*positions, *below)]
    numbers = [len(live), top, k, *lengths[:2], exponent_k, *lengths[2:]]
    return numbers, [*positions, *below, mantissas, bias.astype("<f4").tobytes()]


def _numbers(*values: int) -> bytes:
    """Each in groups of 7 bits, lowest first, the high bit set where more follow; the lowest bit
    of the whole is its sign."""
    coded = bytearray()
    for value in values:
        rest = 2 * value if value >= 0 else -2 * value - 1
        while rest > 127:
            coded.append(rest & 127 | 128)
            rest >>= 7
        coded.append(rest)
    return bytes(coded)
