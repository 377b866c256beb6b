"""What a method is: its settings, and what it does at each moment of an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from sclcore.driver.net import Connected, Net


class Method(BaseModel, frozen=True, extra="forbid"):
    """A way to train a network, as recipes name it and the launcher asks it.

    A subclass declares `name: Literal[…]` with a default, and its settings as fields with a
    description.
    """

    name: str = Field(description="which method")

    look: ClassVar[tuple[str, str] | None] = None
    """Colour and marker in charts; None for one of those that are left."""
    example: ClassVar[Mapping[str, Any] | None] = None
    """Settings with which 42 updates show what it does: tests train it with them."""
    zero_stages: ClassVar[tuple[int, ...]] = (0,)
    """The ZeRO stages it works in: 0 where it needs whole tensors on every rank."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "autocast", "bf16")
    """The values of `engine.precision` it works with."""
    layerwise: ClassVar[bool] = False
    """Whether weights may have other learning rates from layer to layer."""
    takes_masks: ClassVar[bool] = False
    """Whether it has mask variables that can be given at the start."""
    keeps_zeros: ClassVar[bool] = False
    """Whether weights that are 0 at the start stay so, without masks that are given."""

    as_it_was: ClassVar[Mapping[str, Any]] = {}
    """What a setting was before it existed: a run from then goes on so, or is refused by name."""
    imported_as: ClassVar[str | None] = None
    """`package.module:Class`, where a recipe named it so."""

    @model_serializer(mode="wrap")
    def _with_path(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not installed is found again by the path that named it."""
        return handler(self) | ({"name": self.imported_as} if self.imported_as else {})

    def build(self, model: nn.Module, example: Tensor, weights: Mapping[str, Any]) -> Optimizer:
        """The optimizer of a method that no `Driver` drives, as `optimizer_of` asks for it."""
        raise NotImplementedError

    @property
    def target(self) -> tuple[str, float] | None:
        """The key and value of what λ is steered to; None where there is none."""
        return None

    @property
    def update_cost(self) -> float:
        """The arithmetic of an update, in updates of the dense network; over the run, the mean.

        A further forward pass is a third: the backward one multiplies as much for the gradients of
        the weights, and again for those of what the layers were given. Zeros save nothing.
        """
        return 1.0

    def for_run(self, schedule: Schedule, total_steps: int) -> Self:
        """The method with what follows from the length of the run; itself where nothing does."""
        return self

    def foreseen(self, schedule: Schedule, total_steps: int) -> list[str]:
        """Warnings to be had before the first of `total_steps` updates."""
        return []

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """Whether no update after `step` of `total_steps` changes the masks."""
        return step >= total_steps


class DrivenMethod(Method, frozen=True):
    """A method as a `Driver` asks it, the torch optimizer around one.

    It keeps its settings and nothing else: what changes while it trains is in `Connected.state`,
    tensors of any shape and plain values, which are saved and resumed. It is asked in this order:
    `start` once, and then at each update `before_update`, `before_pass` for each forward pass after
    the first, `step`. Everything must come out the same on all ranks, whose gradients are the same,
    and so are `Driver.losses` and the numbers of `Driver.random`.

    Between two updates the parameters are the network as it is evaluated, saved and exported.
    """

    exclude: list[str] = Field(
        default_factory=list, description="patterns of layers that stay dense, such as conv1"
    )

    group_keys: ClassVar[tuple[str, ...]] = ()
    """What `groups` notes in the parameter group of the connections, beside what all have."""
    begins_sparse: ClassVar[bool] = False
    """Whether connections are dead before the first update."""
    started_by: ClassVar[str] = "mask"
    """The key in the state of a tensor that `start` has put there.

    A parameter outside of connections whose state has it is latent too: what others write into it
    is handed to `take`.
    """

    def groups(self, model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
        """Parameter groups: those with `connections: True` hold what may die."""
        from sclcore.network.connections import connection_groups

        return connection_groups(model, exclude=self.exclude)

    def start(self, net: Net, fresh: list[Connected]) -> None:
        """Make the state of tensors that have none, and write their effective weights."""
        raise NotImplementedError

    def passes(self, net: Net) -> int:
        """Forward passes of this update: the first is differentiated, the others give a loss."""
        return 1

    def before_update(self, net: Net) -> None:
        """Write the weights of the first forward pass, where they are not those evaluated."""

    def before_pass(self, net: Net, number: int) -> None:
        """Write the weights of forward pass `number`, 0 for the first one's again."""

    def step(self, net: Net) -> bool:
        """The update; gradients are finite. False if the weights outside must not move with it."""
        raise NotImplementedError

    def lr_progress(self, progress: float) -> float:
        """Where in the schedule of the learning rate the run is, at `progress` of the whole."""
        return progress

    def masks(self, net: Net) -> list[Tensor]:
        """Which connections of each tensor live: bool, of the tensor's shape."""
        raise NotImplementedError

    def write(self, net: Net) -> None:
        """Set the parameters to what the state says, as the network is evaluated."""
        raise NotImplementedError

    def take(self, net: Net, each: Connected) -> int:
        """Make the present values of a parameter its weights; how many are 0 now, being dead."""
        raise NotImplementedError

    def after_epoch(self, net: Net, results: Mapping[str, float]) -> None:
        """Hear of an evaluation: `val/loss`, `val/top1`."""

    def metrics(self, net: Net) -> dict[str, float]:
        """Series of its own for the tracker."""
        return {}
