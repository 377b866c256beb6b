"""The frame that our own file formats share: a header in JSON, sections of bytes, a checksum.

All numbers are little-endian:

    8 bytes   which format
    u16       its version
    u32       bytes of the header
    header    deflated JSON: {"metadata": {…}, "tensors": [{…, "sections": […]}, …]}
    sections  one after the other, as the tensors of the header list them
    u32       CRC-32 of everything before
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sclcore.export.files import ExportError

_START = struct.Struct("<8sHI")
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Kind:
    """A format: its first 8 bytes, the version that is written and read, its name in a sentence."""

    magic: bytes
    version: int
    what: str


def packed(
    kind: Kind,
    tensors: Sequence[Mapping[str, Any]],
    sections: Iterable[Sequence[bytes]],
    metadata: Mapping[str, Any],
) -> bytes:
    """The content of a file; `sections` holds those of each of `tensors`, whose `sections` say the
    bytes of each (negative for those that the format has deflated)."""
    head = {"metadata": dict(metadata), "tensors": list(tensors)}
    header = zlib.compress(json.dumps(head, separators=(",", ":")).encode(), 9)
    content = bytearray(_START.pack(kind.magic, kind.version, len(header)) + header)
    for section in chain.from_iterable(sections):
        content += section
    return bytes(content + struct.pack("<I", zlib.crc32(content)))


def unpacked(
    kind: Kind, path: Path, entry: Callable[..., Entry]
) -> tuple[list[Entry], dict[str, Any], list[list[bytes]]]:
    """(an `entry` for each tensor of the header, metadata, sections of each).

    Raises ExportError for a file of another format or version, and for a damaged one.
    """
    content = path.read_bytes()
    if len(content) < _START.size + 4 or not content.startswith(kind.magic):
        raise ExportError(f"{path.name} is no {kind.what} of SCL")
    _, version, length = _START.unpack_from(content)
    if version != kind.version:
        raise ExportError(f"{path.name} has version {version}; this program reads {kind.version}")
    if zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0]:
        raise ExportError(f"{path.name} is damaged: its checksum does not match")
    try:
        head = json.loads(zlib.decompress(content[_START.size : _START.size + length]))
        tensors = [dict(tensor) for tensor in head["tensors"]]
        metadata = dict(head["metadata"])
        sizes = [[abs(int(size)) for size in tensor["sections"]] for tensor in tensors]
        entries = [entry(**tensor) for tensor in tensors]
    except (ValueError, TypeError, KeyError, zlib.error) as error:
        raise ExportError(f"{path.name} has a header that cannot be read: {error}") from error
    body = content[_START.size + length : -4]
    if sum(map(sum, sizes)) != len(body):
        raise ExportError(
            f"{path.name} is damaged: its header speaks of other sections than it has"
        )
    return entries, metadata, _cut(body, sizes)


def _cut(body: bytes, sizes: list[list[int]]) -> list[list[bytes]]:
    sections, at = [], 0
    for own in sizes:
        sections.append([])
        for size in own:
            sections[-1].append(body[at : at + size])
            at += size
    return sections
