"""What others wrote into parameters since the optimizer did: noticed, and taken over as weights.

`model.load_state_dict` after the first step is such a write, clamping weights in one's own loop is
another. Without this the next step would undo it without a word, since it writes what its own state
says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

Mark = tuple[int, ...]
"""Where a tensor lies in memory, and how often PyTorch saw it written to in place."""


class LastWritten:
    """Parameters as they were when their optimizer last wrote to them.

    Asking costs a look at two numbers for each. PyTorch does not count what is written through
    `p.data`, so that goes unnoticed.
    """

    def __init__(self) -> None:
        self._marks: dict[Tensor, Mark] = {}

    def note(self, params: Iterable[Tensor]) -> None:
        """Remember `params` as they are now."""
        for param in params:
            self._marks[param] = _mark(param)

    def touched(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of `params` that were written to, or moved, since they were noted."""
        marks = self._marks
        return [p for p in params if (known := marks.get(p)) is not None and known != _mark(p)]


def _mark(param: Tensor) -> Mark:
    if not isinstance(param, DTensor):
        return param.data_ptr(), param._version
    # A write to the DTensor counts for it, one to this rank's part of it for that part.
    part = param.to_local()
    return part.data_ptr(), part._version, param._version


def say_lost(lost: dict[str, int], warn: Callable[[str], Any]) -> None:
    """Say in one sentence that values were set to 0 because their connections are dead."""
    if lost:
        first, *others = lost
        more = f" and {len(others)} more tensors" if others else ""
        warn(
            f"the values written into {first}{more} since the last step were taken over as the "
            f"weights, but {sum(lost.values()):,} of them belong to dead connections and are 0 "
            "now: load the optimizer's state along with the model's, or choose the connections "
            "with set_masks"
        )
