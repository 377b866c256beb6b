"""RigL: a sparse network from the first update on, which moves its connections while it trains.

Source: Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners",
ICML 2020, arXiv 1911.11134, Algorithm 1; the densities of layers are those of its Erdős–Rényi
kernel. With gradients of all connections at hand, growing costs nothing here, but nothing of the
sparsity is saved in training either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sclcore.baselines.base import Connected, Masked, largest


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The density of each layer: in proportion to Σ shape / Π shape, at most 1, `density` overall.

    Small layers would come out above 1; they are dense, and the others share what is left.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        sparse = [i for i in range(len(sizes)) if i not in dense]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in sparse) if sparse else 0.0
        full = max((raw[i] for i in sparse), default=0.0)
        if scale * full <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        dense |= {i for i in sparse if raw[i] == full}


class RigL(Masked):
    """Drops the smallest weights of each layer and grows those with the largest gradients.

    `params` are parameter groups made by `connection_groups`: what is dead from the beginning is
    set to 0 at once. `lr` and the settings of the weights (`momentum`, `nesterov`, `weight_decay`,
    `weight_rule`, `betas`, `eps`) are those of `SCL`. `density` is the share of connections that
    live, over all layers, exactly and always. Every `every` updates connections are exchanged, and
    weights do not move; `drop_fraction` is the share of a layer that the first exchange may
    replace, and falls with a half cosine to 0 at the progress `end`, from which the masks no longer
    change. `seed` decides which connections live at first; it must be the same on all ranks.

    State per tensor of connections: `mask` (bool) and the buffers of the weights' rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        density: float,
        *,
        drop_fraction: float = 0.3,
        end: float = 0.75,
        every: int = 100,
        seed: int = 0,
        **weights: Any,
    ) -> None:
        rule = {
            "density": density,
            "drop_fraction": drop_fraction,
            "end": end,
            "every": every,
            "seed": seed,
        }
        super().__init__(params, lr, rule, **weights)
        self.write_weights()
        # An engine may replace the parameters; the same masks are made again for those.
        self.state.clear()

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not 0 < group["density"] <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {group['density']}")
        if not 0 < group["drop_fraction"] <= 1:
            raise ValueError(
                f"drop_fraction must be above 0 and at most 1, not {group['drop_fraction']}"
            )
        if not 0 < group["end"] <= 1:
            raise ValueError(f"end must be progress above 0 and at most 1, not {group['end']}")
        if group["every"] < 1:
            raise ValueError(f"every must be at least 1, not {group['every']}")

    def _first_masks(self, connections: list[Connected]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self._first["seed"])
        counts = _counts([each.param.shape for each in connections], self._first["density"])
        masks = []
        for each, count in zip(connections, counts, strict=True):
            mask = torch.zeros(each.param.numel(), dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=generator)[:count]] = True
            masks.append(mask.view(each.param.shape))
        return masks

    def _step_connections(self, connections: list[Connected]) -> bool:
        group = self._first
        updates, progress = group["updates"], group["progress"]
        if not updates or updates % group["every"] or progress >= group["end"]:
            self._move_weights([each.state["mask"] for each in connections])
            return True
        fraction = 0.5 * group["drop_fraction"] * (1 + math.cos(math.pi * progress / group["end"]))
        for each in connections:
            if each.param.grad is not None:
                self._set_mask(each, _exchanged(each, each.param.grad, fraction))
        return False


def _exchanged(each: Connected, grad: Tensor, fraction: float) -> Tensor:
    """The mask after one exchange: as many connections as before.

    What was just dropped may grow again at once, and then keeps its value.
    """
    mask = each.state["mask"]
    live = int(mask.sum())
    dropped = int(fraction * live)
    sizes = torch.where(mask, each.param.abs(), -1.0).flatten()
    kept = largest(sizes, live - dropped)
    grown = largest(torch.where(kept, -1.0, grad.abs().flatten()), dropped)
    return (kept | grown).view(mask.shape)


def _counts(shapes: Sequence[Sequence[int]], density: float) -> list[int]:
    """Whole numbers of connections near ERK's densities, whose sum is exact; 1 at least."""
    sizes = [math.prod(shape) for shape in shapes]
    wanted = [d * n for d, n in zip(erk_densities(shapes, density), sizes, strict=True)]
    counts = [max(1, math.floor(number)) for number in wanted]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    for i in by_fraction[: max(0, round(density * sum(sizes)) - sum(counts))]:
        counts[i] = min(sizes[i], counts[i] + 1)
    return counts
