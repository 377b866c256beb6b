"""The settings of one step, as the update of a piece needs them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sclcore.optim.rules import AdamW


@dataclass(frozen=True)
class Options:
    """The settings of one parameter group at this step; `price` is λ · c of the tensor."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    mask_lr: float
    mask_momentum: float
    mask_restart: float
    """Where m begins anew once it has risen above 0, its momentum being 0; 0: it goes on."""
    mask_gradient: str
    """What G counts by in a mask gradient: `full`, the weight, or `root`, the root of its size."""
    proxy: str
    price: float
    noise: int
    """Seeds the random rounding of mask variables in bfloat16; another number at each step."""
    adamw: AdamW | None = None
    """Where given, weights move by AdamW, and SGD's settings are not used."""


OF_GROUP = tuple(f.name for f in fields(Options) if f.name not in ("price", "noise", "adamw"))
"""What is the group's own setting of that name."""
RATES = tuple(f.name for f in fields(Options) if f.type == "float" and f.name in OF_GROUP)
"""The numbers that a fused step is given, in this order."""
