"""The parameters of a network as a rank holds them between updates, and who trains what of them.

In ZeRO stages 0 to 2 every rank has the whole network. In stage 3 (launcher/run/zero3.py) it has a
stretch of each parameter, and what looks at the network, saves it or averages it goes through here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

from sclcore.optim.shards import Shard

Shards = list[list[Shard]]
"""What a rank's flat tensor of each parameter group holds."""


class Parameters:
    """Those of a network that every rank has whole. Its methods are collective in stage 3."""

    are_whole = True
    shards: Shards | None = None
    """What the optimizer trains on this rank; None where it trains whole parameters."""
    ranks: dist.ProcessGroup | None = None
    """Those that share the parameters of the optimizer out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def own(self) -> dict[str, Tensor]:
        """What this rank holds of each parameter, by name: the memory in use, detached."""
        # Through `data`, so that an optimizer does not take what is written for new weights.
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def take(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `own` would be of tensors of the parameters' shapes, by name."""
        return {name: whole[name] for name, _ in self.model.named_parameters()}

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Elements `start` … `start + length` of a parameter, flat, of those that are held here."""
        return self.model.get_parameter(name).detach().reshape(-1)[start : start + length]

    def changed(self) -> None:
        """To be called when what `own` gave was written to: the network computes with it then."""

    def update(self) -> None:
        """Take over what the optimizer's flat tensors hold, where there are any."""

    def gathered(self, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Values like those of `own`, of all ranks, as whole tensors: on rank 0, elsewhere None."""
        return dict(own) if dist.get_rank() == 0 else None

    def state(self) -> dict[str, Tensor] | None:
        """The state_dict of the network: on rank 0, elsewhere None."""
        whole = self.gathered(self.own())
        if whole is None:
            return None
        return {
            key: whole[self._names[id(value)]] if id(value) in self._names else value.detach()
            for key, value in self.model.state_dict(keep_vars=True).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`. Raises RuntimeError where it is of another network."""
        self.model.load_state_dict(state)
