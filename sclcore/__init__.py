"""Sparse Connectivity Learning for any PyTorch training loop.

from sclcore import SCL, connection_groups

optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sclcore.network.connections import connection_groups, layer_budgets, weight_uses
    from sclcore.optim.sparse import apply_masks
    from sclcore.schedule import Schedule, Scheduler
    from sclcore.scl.optimizer import SCL

__all__ = [
    "SCL",
    "Schedule",
    "Scheduler",
    "apply_masks",
    "connection_groups",
    "layer_budgets",
    "weight_uses",
]

# Looked up when first asked for: whoever reads a recipe needs `Schedule` and no second of torch.
_HOMES = {
    "SCL": "sclcore.scl.optimizer",
    "Schedule": "sclcore.schedule",
    "Scheduler": "sclcore.schedule",
    "apply_masks": "sclcore.optim.sparse",
    "connection_groups": "sclcore.network.connections",
    "layer_budgets": "sclcore.network.connections",
    "weight_uses": "sclcore.network.connections",
}


if not TYPE_CHECKING:  # else a checker of types would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
