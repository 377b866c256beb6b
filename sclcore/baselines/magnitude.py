"""Gradual magnitude pruning with one threshold for all layers.

Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878: the sparsity rises by a cubic
schedule while the network trains. There each layer reaches the same sparsity; here the smallest
weights of the whole network go, wherever they are, which is the stronger baseline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sclcore.baselines.base import Connected, Masked, largest


def cubic_density(progress: float, *, final: float, begin: float, end: float) -> float:
    """1 − s(t), with s(t) = s_f − s_f · (1 − t)³ and t from 0 at `begin` to 1 at `end`."""
    if progress >= end:
        return final
    t = max(0.0, progress - begin) / (end - begin)
    return final + (1 - final) * (1 - t) ** 3


class Magnitude(Masked):
    """Removes the smallest weights in the course of training, for good.

    `params` are parameter groups made by `connection_groups`; `lr` and the settings of the weights
    (`momentum`, `nesterov`, `weight_decay`, `weight_rule`, `betas`, `eps`) are those of `SCL`.
    `density` is the share of connections that live in the end, over all layers, exactly. Pruning
    begins and ends at the progress `begin` and `end`, with `every` updates between two prunings.

    The largest weight of each layer stays, whatever the threshold. State per tensor of connections:
    `mask` (bool) and the buffers of the weights' rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        density: float,
        *,
        begin: float = 0.0,
        end: float = 0.5,
        every: int = 10,
        **weights: Any,
    ) -> None:
        rule = {"density": density, "begin": begin, "end": end, "every": every}
        super().__init__(params, lr, rule, **weights)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if not 0 < group["density"] <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {group['density']}")
        if not 0 <= group["begin"] < group["end"] <= 1:
            raise ValueError(
                f"begin and end must be progress, 0 ≤ begin < end ≤ 1, not {group['begin']} and "
                f"{group['end']}"
            )
        if group["every"] < 1:
            raise ValueError(f"every must be at least 1, not {group['every']}")

    def _reset(self) -> None:
        super()._reset()
        self._is_done = False

    def _step_connections(self, connections: list[Connected]) -> bool:
        group = self._first
        progress, due = group["progress"], group["updates"] % group["every"] == 0
        self._move_weights([each.state["mask"] for each in connections])
        ended = progress >= group["end"]
        if group["begin"] <= progress and ((ended and not self._is_done) or (due and not ended)):
            density = cubic_density(
                progress, final=group["density"], begin=group["begin"], end=group["end"]
            )
            self._prune(connections, round(density * sum(self.connection_sizes().values())))
            self._is_done = ended
        return True

    def _prune(self, connections: list[Connected], count: int) -> None:
        """Keep the `count` largest weights of all layers, of those that live."""
        # What is dead comes after a live weight that happens to be 0.
        scores = [
            torch.where(each.state["mask"], each.param.abs(), -1.0).flatten()
            for each in connections
        ]
        count = min(count, sum(int((score >= 0).sum()) for score in scores))
        kept = _split_largest(scores, count)
        dying = [each.name for each, mask in zip(connections, kept, strict=True) if not mask.any()]
        if dying:
            self.held_layers = dying
            scores = [score.masked_fill(largest(score, 1), torch.inf) for score in scores]
            kept = _split_largest(scores, max(count, len(scores)))
        for each, mask in zip(connections, kept, strict=True):
            self._set_mask(each, mask.view_as(each.param))


def _split_largest(scores: list[Tensor], count: int) -> tuple[Tensor, ...]:
    return largest(torch.cat(scores), count).split([len(score) for score in scores])
