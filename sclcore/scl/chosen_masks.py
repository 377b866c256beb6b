"""Masks that a user chooses: checked against their tensors, and put into the state."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import flat


def check_names(given: Mapping[str, Any], known: list[str]) -> None:
    """ValueError where a name is none of the tensors of connections."""
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known[:3])} …"
        raise ValueError(f"no tensor of connections is called {name}: {hint}")


def mask_variables_of(given: Tensor, tensor: Geometry, mask_init: float) -> Tensor:
    """The mask variables that `given` stands for: bool chooses what is live, floats are them.

    Raises ValueError with one sentence where the tensor cannot have such masks.
    """
    name = tensor.name
    if tuple(given.shape) != tensor.shape:
        shape = tuple(given.shape)
        raise ValueError(f"the mask of {name} must have the shape {tensor.shape}, not {shape}")
    if given.dtype != torch.bool and not given.is_floating_point():
        raise ValueError(
            f"the mask of {name} must be bool (true is live) or hold mask variables as floats, not "
            f"{given.dtype}: pass mask.bool() if it has ones and zeros"
        )
    rows = given.detach().reshape(-1, tensor.unit)
    if not rows.isfinite().all():
        raise ValueError(f"the mask variables of {name} must be finite")
    if (rows != rows[:, :1]).any():
        raise ValueError(
            f"the mask of {name} differs within one of its units of {tensor.unit} weights, which "
            "live or die together: give all of them one value, or choose the granularity weight"
        )
    if given.dtype != torch.bool:
        return given.detach()
    if tensor.n_m is not None:
        n, m = tensor.n_m
        if (given.reshape(-1, m).sum(1) > n).any():
            raise ValueError(f"the mask of {name} has more than {n} live among {m} neighbours")
    dead = torch.full_like(given, -mask_init, dtype=torch.float64)
    return dead.masked_fill_(given, mask_init)


@torch.no_grad()
def put(held: Holdings, masks: Mapping[str, Tensor]) -> None:
    """Set mask variables, whole tensors by name, and their momentum to 0, as far as held here."""
    for piece, source in zip(held.pieces, held.sources, strict=True):
        values = masks.get(piece.tensor.name)
        if values is None:
            continue
        values = values.to(piece.mask.device)
        if held.exchange is not None:
            mine = values.reshape(-1)[piece.start : piece.end]
        elif piece.target is not None:
            mine = values.reshape(-1)
        else:
            mine = flat(torch.empty_like(source.param, dtype=values.dtype).copy_(values))
        piece.mask.copy_(mine)
        piece.mask_momentum.zero_()
