"""A file that counts as written only when it is whole and has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class ExportError(Exception):
    """What was written does not hold what it should, or cannot be written; the message says why."""


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: write and check there; `path` appears when the block ends.

    An exception leaves `path` as it was and nothing else.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # What files here may be read by: safetensors would keep its own to their owner.
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether type, shape and bytes are equal: the bytes of a NaN, unlike it, equal themselves."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
