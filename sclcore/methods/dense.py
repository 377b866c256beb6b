"""The dense network, trained by torch's own optimizers: what every other method is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sclcore.driver.method import Method
from sclcore.lazy import torch
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class Dense(Method, frozen=True):
    """The dense network: the same optimizer of the weights, data, schedule and engine."""

    look: ClassVar = ("#1f2933", "D")
    zero_stages: ClassVar = (0, 1, 2, 3)
    layerwise: ClassVar = True

    name: Literal["dense"] = Field(default="dense", description="keep every connection")

    def build(self, model: nn.Module, example: Tensor, weights: Mapping[str, Any]) -> Optimizer:
        """torch's SGD or AdamW; the same parameters are decayed as under the other methods."""
        from sclcore.network.layers import undecayed

        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        spared = undecayed(model)
        groups = [
            {"params": [p for n, p in parameters.items() if n not in spared]},
            {"params": [p for n, p in parameters.items() if n in spared], "weight_decay": 0.0},
        ]
        settings = dict(weights)
        if settings.pop("weight_rule") == "adamw":
            # Fused, as SCL's step is; not on the meta device, where only shapes are checked.
            fused = not any(p.is_meta for p in parameters.values())
            return torch.optim.AdamW(groups, **settings, fused=fused)
        return torch.optim.SGD(groups, **settings)

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return True
