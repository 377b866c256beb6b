"""One form of a model, as it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Run = Callable[[Tensor], object]


@dataclass(frozen=True)
class Form:
    """A way to run the model: `run` takes a batch of images, and is None where `why_not` says.

    `bytes` are those of its file, where it has one.
    """

    name: str
    run: Run | None
    why_not: str = ""
    bytes: int | None = None
