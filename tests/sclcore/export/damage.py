"""Files that are no longer what was written."""

from __future__ import annotations

from collections.abc import Callable


def flip(at: float) -> Callable[[bytes], bytes]:
    """One bit is another, at this share of the file."""

    def change(data: bytes) -> bytes:
        index = int(at * (len(data) - 1))
        return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

    return change
