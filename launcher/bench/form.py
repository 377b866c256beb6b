"""One form of a model, as it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Run = Callable[[Tensor], object]


@dataclass(frozen=True)
class Form:
    """A way to run the model: `open` gives it for so many threads, and is None for a reason,
    `why_not`.

    `engine` and `file` are what another process runs it with (launcher/bench/memory.py); `bytes`
    are those of a file that one would keep.
    """

    name: str
    open: Callable[[int], Run] | None
    why_not: str = ""
    engine: str = ""
    file: Path | None = None
    bytes: int | None = None
