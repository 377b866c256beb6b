"""The exponential moving average of a run's weights: kept beside them, put in their place to look.

Of what the network computes with, so that it is the same in any ZeRO stage: every rank keeps, in
float32, the average of the parameters that it holds, which are all of them below stage 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from launcher.run.parameters import Parameters

# a ← d · a + (1 - d) · v, with d growing to its final value over the first updates, as
# TensorFlow's ExponentialMovingAverage does it: (1 + n) / (10 + n) at update n.
_BEGINS_OVER = 10


class WeightAverage:
    """The average of the parameters and of the floating-point buffers (batch norm's statistics).

    `masked` are the parameters whose zeros are dead connections: these are 0 in the averaged
    network as well, whatever they were before they died.
    """

    def __init__(self, parameters: Parameters, decay: float, masked: Collection[str] = ()) -> None:
        self._parameters, self._model = parameters, parameters.model
        self._decay = decay
        self._masked = frozenset(masked)
        self._own = {name: value.float().clone() for name, value in self._present().items()}
        self._updates = 0

    def update(self) -> None:
        """Take in the network as it is after an update."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (_BEGINS_OVER + self._updates))
        present = [value.float() for value in self._present().values()]
        torch._foreach_lerp_([*self._own.values()], present, 1 - decay)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged network in the model, until the block ends. Collective."""
        before = {name: value.clone() for name, value in self._present().items()}
        for name, value in self._present().items():
            value.copy_(self._seen(name, value))
        self._parameters.changed()
        try:
            yield
        finally:
            for name, value in self._present().items():
                value.copy_(before[name])
            self._parameters.changed()

    def state(self) -> dict[str, Any]:
        """What this rank keeps, for a checkpoint: the memory in use, not copies.

        Buffers differ from rank to rank, parameters do not.
        """
        names = {name for name, _ in self._model.named_buffers()}
        buffers = {name: value for name, value in self._own.items() if name in names}
        return {"updates": self._updates, "buffers": buffers}

    def parameters(self) -> dict[str, Tensor] | None:
        """The average of each parameter, whole, before any mask: on rank 0, elsewhere None.

        Collective.
        """
        return self._parameters.gathered({name: self._own[name] for name in self._parameters.own()})

    def restore(self, saved: dict[str, Tensor], state: dict[str, Any], *, same_world: bool) -> None:
        """Undo `parameters` and `state`; at another world size with what `saved` has of buffers."""
        self._updates = state["updates"]
        buffers, own = state["buffers"], self._parameters.take(saved)
        saved = {name: value for name, value in saved.items() if name not in own}
        values = own | (saved | buffers if same_world else buffers | saved)
        for name, value in values.items():
            self._own[name].copy_(value)

    def _present(self) -> dict[str, Tensor]:
        buffers = {n: b.data for n, b in self._model.named_buffers() if b.is_floating_point()}
        return self._parameters.own() | buffers

    def _seen(self, name: str, value: Tensor) -> Tensor:
        own = self._own[name]
        return torch.where(value != 0, own, 0.0) if name in self._masked else own
