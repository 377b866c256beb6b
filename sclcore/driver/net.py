"""What a method may ask of the optimizer around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Connected:
    """One parameter and its state: tensors of any shape, and plain values."""

    name: str
    param: Tensor
    state: dict[str, Any]
    transposed: bool = False
    """Whether its second dimension counts output features: of a ConvTranspose or Conv1D."""

    @property
    def grad(self) -> Tensor:
        """∂L/∂v of all its elements, averaged over the ranks; 0 where the loss depends on none."""
        grad = self.param.grad
        return self.param.new_zeros(()).expand_as(self.param) if grad is None else grad


class Net(Protocol):
    """A network in the middle of its training, as the `Driver` of a method shows it."""

    held_layers: list[str]
    """Names of the layers that were kept from dying in this update; for the method to set."""

    @property
    def tensors(self) -> list[Connected]:
        """All tensors of connections, in the order of the groups, their state made if need be."""
        ...

    @property
    def others(self) -> list[Connected]:
        """All parameters outside of connections."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The parameter group of the connections: `lr`, `momentum`, `weight_decay` and others."""
        ...

    @property
    def progress(self) -> float:
        """The share of the run that lies behind this update."""
        ...

    @property
    def updates(self) -> int:
        """How many updates lie behind this one."""
        ...

    @property
    def losses(self) -> list[float]:
        """The mean loss of each forward pass of this update, over all ranks. Collective."""
        ...

    def connection_sizes(self) -> dict[str, int]:
        """How many connections each tensor has, live and dead."""
        ...

    def random(self) -> Generator:
        """Random numbers of this update: the same on all ranks, and after a resume; on the CPU."""
        ...

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """A copy of `value`, averaged over the ranks where there are any. Collective."""
        ...

    def move(self, masks: Iterable[Tensor]) -> None:
        """One update of the connections by their group's rule, with G ⊙ mask for a gradient.

        A mask is bool, or has a factor for each weight. Where a weight and all its buffers are 0
        under a mask of 0, they stay so.
        """
        ...

    def move_others(self) -> None:
        """One update of all parameters outside of connections."""
        ...
