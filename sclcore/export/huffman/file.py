"""A model with shared weights as a file: connections as HAM or sHAM, all other tensors as they are.

The frame is that of sclcore/export/container.py, with b"SCLHUFFM" at its head; docs/formats.md says
the format, version 1, in full.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclcore.export.container import Kind, packed, unpacked
from sclcore.export.files import ExportError, same_bits, staged
from sclcore.export.huffman.matrices import FORMS, Matrix
from sclcore.export.values import bits_of, tensor_of

_KIND = Kind(b"SCLHUFFM", 1, "HAM or sHAM file")


class NothingSmaller(ExportError):
    """No connection of the model would be smaller in the form that was asked for."""


@dataclass(frozen=True)
class CodedEntry:
    """One tensor of the header. `form`: plain, ham or sham; `sections`: bytes of each."""

    name: str
    dtype: str
    shape: list[int]
    form: str
    sections: list[int]


def save_huffman(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    form: str,
    connections: Collection[str],
    metadata: Mapping[str, Any] | None = None,
) -> list[CodedEntry]:
    """Write `state` with the tensors named by `connections` as `form`, ham or sham.

    A connection that would not be smaller so is written as it is, like all other tensors. The file
    is read back, compared bit for bit, and only then renamed to `path`. Raises ValueError for
    another `form`, NothingSmaller where that is so of all connections, ExportError where a tensor
    cannot be written or reads back differently; any of them leaves nothing behind.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    coded = [
        _encode(name, t, form if name in connections else "plain") for name, t in state.items()
    ]
    entries = [entry for entry, _ in coded]
    if all(entry.form == "plain" for entry in entries):
        raise NothingSmaller("no layer would be smaller so, with so many different weights")
    sections = [sections for _, sections in coded]
    content = packed(_KIND, [asdict(entry) for entry in entries], sections, metadata or {})
    with staged(path) as temporary:
        temporary.write_bytes(content)
        _verify(path.name, load_huffman(temporary), state)
    return entries


def load_huffman(path: Path | str) -> dict[str, Tensor]:
    """The state_dict in a HAM or sHAM file: dense tensors, for `load_state_dict`.

    Raises ExportError if it is none, from a newer version, or damaged.
    """
    state = {}
    for name, value in open_huffman(path).items():
        try:
            state[name] = value if isinstance(value, Tensor) else value.dense()
        except ExportError as error:
            raise _damaged(Path(path), name, error) from error
    return state


def open_huffman(path: Path | str) -> dict[str, Tensor | Matrix]:
    """The tensors in a HAM or sHAM file by name, those that are coded as `Ham` or `Sham`.

    Raises as `load_huffman` does; what is wrong with a stream shows when it is read.
    """
    path = Path(path)
    entries, _, sections = unpacked(_KIND, path, CodedEntry)
    found: dict[str, Tensor | Matrix] = {}
    for entry, own in zip(entries, sections, strict=True):
        try:
            found[entry.name] = _decode(entry, own)
        except (ExportError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise _damaged(path, entry.name, error) from error
    return found


def read_huffman_header(path: Path) -> tuple[list[CodedEntry], dict[str, Any]]:
    """(entries, metadata) of a HAM or sHAM file; raises as `load_huffman` does."""
    entries, metadata, _ = unpacked(_KIND, path, CodedEntry)
    return entries, metadata


def _encode(name: str, tensor: Tensor, form: str) -> tuple[CodedEntry, list[bytes]]:
    try:
        sections = [bits_of(tensor).tobytes()]
    except ExportError as error:
        raise ExportError(f"{name} cannot be written as {form}: {error}") from None
    if form != "plain":
        try:
            coded = FORMS[form].of(tensor).sections()
        except ExportError:
            coded = sections
        if sum(map(len, coded)) < len(sections[0]):
            sections = coded
        else:
            form = "plain"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return CodedEntry(name, dtype, list(tensor.shape), form, list(map(len, sections))), sections


def _decode(entry: CodedEntry, sections: list[bytes]) -> Tensor | Matrix:
    dtype, shape = getattr(torch, entry.dtype), torch.Size(entry.shape)
    if entry.form in FORMS:
        return FORMS[entry.form].read(sections, dtype, shape)
    if entry.form != "plain":
        raise ExportError(f"it has the unknown form {entry.form!r}")
    elements = np.frombuffer(sections[0], f"<u{dtype.itemsize}")
    if len(elements) != math.prod(shape):
        raise ExportError("it has another number of values than its shape")
    return tensor_of(elements, dtype, tuple(shape))


def _verify(name: str, read: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if list(read) != list(state):
        raise ExportError(f"{name} holds other tensors than the model")
    for key, tensor in state.items():
        if not same_bits(read[key], tensor.detach().cpu()):
            raise ExportError(f"{key} reads back with other values than were written")


def _damaged(path: Path, name: str, error: Exception) -> ExportError:
    return ExportError(f"{path.name}: tensor {name} is damaged: {error}")
