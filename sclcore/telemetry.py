"""What the masks are doing: densities, flips, imbalance of features, and warnings by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sclcore.network.connections import LayerBudget
from sclcore.optim.sparse import Observation, SparseOptimizer
from sclcore.scl.optimizer import SCL

# The thresholds of the failure modes; each is a judgement, not a law.
_NEAR = 0.1
_UNMOVED_SHARE = 0.999
_COLLAPSE_WITHIN = 0.02
_FLICKER_SHARE = 0.01
_HOVERING_SHARE, _HOVERING_FROM, _PART = 0.2, 0.8, 0.05


# Of the histogram of m: 40 bins of 0.05 around 0, the outer ones hold all that lies beyond. A bin
# holds its right edge and not its left one, so that those up to 0 are the dead connections.
HISTOGRAM_EDGES = tuple(round(-1 + 0.05 * i, 2) for i in range(41))
_INNER_EDGES = np.array(HISTOGRAM_EDGES[1:-1], dtype=np.float32)


@dataclass(frozen=True)
class Snapshot:
    """The masks at one moment. `live` and `connections` are counts by layer (parameter name)."""

    live: dict[str, int]
    connections: dict[str, int]
    near_zero: float
    """Share of mask variables within ±0.1 of 0: those that may flip soon."""
    quantiles: tuple[float, float, float]
    """5 %, 50 % and 95 % quantile of the mask variables of all layers."""
    mask_init: float
    histogram: tuple[int, ...]
    """How many of the mask variables looked at lie between `HISTOGRAM_EDGES` [40]."""

    @property
    def density(self) -> float:
        return sum(self.live.values()) / sum(self.connections.values())

    def metrics(self) -> dict[str, float]:
        """Flat series for a tracker."""
        low, median, high = self.quantiles
        series = {
            "connections/live": float(sum(self.live.values())),
            "connections/density": self.density,
            "masks/near_zero": self.near_zero,
            "masks/q05": low,
            "masks/median": median,
            "masks/q95": high,
        }
        for layer, live in self.live.items():
            series[f"density/{layer}"] = live / self.connections[layer]
        return series


@overload
def snapshot(optimizer: SCL, sample: int = ..., *, recount: bool = ...) -> Snapshot: ...
@overload
def snapshot(
    optimizer: SparseOptimizer, sample: int = ..., *, recount: bool = ...
) -> Snapshot | None: ...
def snapshot(
    optimizer: SparseOptimizer, sample: int = 100_000, *, recount: bool = True
) -> Snapshot | None:
    """Counts are exact; everything else comes from about `sample` evenly spaced mask variables.

    None of a method that has no mask variables. Without `recount`, connections are those that the
    last step counted: nearly free, and right unless somebody changed the state since. Collective
    where state is sharded.
    """
    if not isinstance(optimizer, SCL):
        return None
    live = optimizer.live_connections() if recount else optimizer.counted_connections()
    sizes = optimizer.connection_sizes()
    init = next(g["mask_init"] for g in optimizer.param_groups if g["connections"])
    values = np.sort(optimizer.sample_mask_variables(sample).numpy())
    if not len(values):
        return Snapshot(live, sizes, 0.0, (init, init, init), init, (0,) * 40)
    low, median, high = (float(values[round(q * (len(values) - 1))]) for q in (0.05, 0.5, 0.95))
    # Sorted, every count is a difference of two places.
    first, last = np.searchsorted(values, -_NEAR, "right"), np.searchsorted(values, _NEAR, "left")
    near = max(0, int(last - first)) / len(values)
    inner = np.searchsorted(values, _INNER_EDGES, "right")
    counts = np.diff(inner, prepend=0, append=len(values))
    return Snapshot(live, sizes, near, (low, median, high), init, tuple(counts.tolist()))


def connection_metrics(budgets: Sequence[LayerBudget], live: Mapping[str, int]) -> dict[str, float]:
    """Connections and MACs, of the network and of each layer in `live`, as flat series.

    `budgets` are those of the dense network (`layer_budgets` without masks), `live` counts the live
    connections by layer; layers that are not in it keep all of theirs. MACs are those of one
    sample, as they would be if dead connections cost nothing.
    """
    kept = {b.layer: live.get(b.layer, b.connections) for b in budgets}
    macs = {b.layer: b.macs_dense * kept[b.layer] / b.connections for b in budgets}
    total, dense = round(sum(macs.values())), sum(b.macs_dense for b in budgets)
    series = {
        "connections/live": float(sum(kept.values())),
        "connections/density": sum(kept.values()) / sum(b.connections for b in budgets),
        "connections/macs": float(total),
        "connections/macs_share": total / dense if dense else 1.0,
    }
    for b in budgets:
        if b.layer in live:
            series[f"density/{b.layer}"] = kept[b.layer] / b.connections
            series[f"macs/{b.layer}"] = float(round(macs[b.layer]))
    return series


def observation_metrics(observations: Mapping[str, Observation]) -> dict[str, float]:
    """Imbalance of the features in one observed step (`SCL.observing`), as flat series.

    Imbalance is the largest rms of a feature's mask gradient over the median one, within a layer,
    before normalisation and after; `masks/…` has the worst layer. Without normalisation it is what
    λ would have to be fair to. Dead features are those that receive no mask gradient at all.
    """
    if not observations:
        return {}
    # One transfer from the device, not some for each layer.
    all_rms = [o.rms_before for o in observations.values()]
    all_rms += [o.rms_after for o in observations.values()]
    values = torch.cat(all_rms).float().cpu().numpy()
    ends = np.cumsum([len(rms) for rms in all_rms])
    parts = np.split(values, ends[:-1])
    before, after = parts[: len(observations)], parts[len(observations) :]
    imbalance = dict(zip(observations, map(_imbalance, before), strict=True))
    return {
        "masks/imbalance_before": max(imbalance.values()),
        "masks/imbalance_after": max(map(_imbalance, after)),
        "masks/dead_features": float(sum(int((rms == 0).sum()) for rms in before)),
        **{f"imbalance/{layer}": value for layer, value in imbalance.items()},
    }


def revivals(observations: Mapping[str, Observation]) -> float | None:
    """How many masks came to life in one observed step; None if it was not observed."""
    return float(sum(o.revivals for o in observations.values())) if observations else None


def hovering(revived: float, live: Mapping[str, int]) -> float:
    """How often a live connection has come to life, in the mean; 0 once masks have settled."""
    return revived / max(1, sum(live.values()))


def _imbalance(rms: np.ndarray) -> float:
    alive = np.sort(rms[rms > 0])
    return float(alive[-1] / alive[(len(alive) - 1) // 2]) if len(alive) else 1.0


class FlipCounter:
    """Counts masks that change, between one `take` and the next.

    `SCL` counts every change of every update: one that dies and comes back has flipped twice. Of
    other optimizers, which know no such count, the masks are compared with those of the last time,
    and at first with a dense network.
    """

    def __init__(self, optimizer: SparseOptimizer) -> None:
        self._optimizer = optimizer
        self._last: dict[str, Tensor] = {}

    def take(self) -> dict[str, float]:
        """`masks/flips` and, of these, `masks/revivals`: the dead that live again. Collective."""
        if isinstance(self._optimizer, SCL):
            pairs = [*self._optimizer.take_flips().values()]
            flips, revived = (sum(pair[i] for pair in pairs) for i in (0, 1))
        else:
            flips = revived = 0
            for name, mask in self._optimizer.masks().items():
                before = self._last.get(name)
                changed = ~mask if before is None else mask != before
                flips += int(changed.sum())
                revived += int((changed & mask).sum())
                self._last[name] = mask.clone()
        return {"masks/flips": float(flips), "masks/revivals": float(revived)}

    def state(self) -> dict[Any, Tensor]:
        """What this rank has counted so far: its own memory, not a copy."""
        return self._optimizer.flips if isinstance(self._optimizer, SCL) else self._last

    def restore(self, state: Mapping[Any, Tensor] | None) -> None:
        """Go on from `state`, of the same rank among as many; None: begin to count now."""
        if isinstance(self._optimizer, SCL):
            self._optimizer.flips = self._on_device(state or {})
        elif state is None:
            self._last = self._on_device(self._optimizer.masks())
        else:
            self._last = self._on_device(state)

    def _on_device(self, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        device = self._optimizer.param_groups[0]["params"][0].device
        return {key: value.to(device, copy=True) for key, value in tensors.items()}


@dataclass
class MaskHealth:
    """Watches a run for the known ways in which learning a connectivity fails.

    `check` returns new warnings, each once per run (per layer for `layer-collapse`), as
    "name: sentence". `freeze_at` is the progress from which masks are final (`Schedule`): what has
    to have happened by half-time is judged by half of the time in which masks are learned.
    """

    freeze_at: float = 1.0
    _seen: set[str] = field(default_factory=set)
    _early_revivals: float | None = None
    _last: float | None = None

    def check(
        self,
        progress: float,
        shot: Snapshot,
        *,
        held_layers: list[str] | None = None,
        revivals: float | None = None,
        hovering: float = 0.0,
    ) -> list[str]:
        """`revivals`: masks that came to life in one recent step, while masks are learned.

        `hovering`: how often a live connection has come to life since the last check, in the mean.
        """
        learned = progress / self.freeze_at if self.freeze_at else 1.0
        last, self._last = self._last, learned
        found = {
            "lambda-too-large": self._too_large(progress, shot),
            "nothing-moving": self._unmoved(learned, progress, shot),
            "flicker": self._flicker(learned, progress, shot, revivals),
            "hovering": self._hovers(learned, last, hovering),
        }
        found |= {
            f"layer-collapse {name}": self._collapse(name, shot) for name in held_layers or []
        }
        fresh = {key: text for key, text in found.items() if text and key not in self._seen}
        self._seen.update(fresh)
        return list(fresh.values())

    def _collapse(self, layer: str, shot: Snapshot) -> str:
        return (
            f"layer-collapse: {layer} lost its last connections; min_connections keeps the "
            f"{shot.live[layer]} best of {shot.connections[layer]}. Lower lam, or add the layer to "
            "exclude."
        )

    def _too_large(self, progress: float, shot: Snapshot) -> str | None:
        if progress > _COLLAPSE_WITHIN or shot.density >= 0.5:
            return None
        return (
            f"lambda-too-large: {1 - shot.density:.0%} of the connections vanished within the "
            f"first {progress:.1%} of the run. Lower lam or mask_lr."
        )

    def _unmoved(self, learned: float, progress: float, shot: Snapshot) -> str | None:
        settled = shot.density < _UNMOVED_SHARE or shot.quantiles[0] <= _NEAR
        if not self.freeze_at or learned < 0.5 or settled:
            return None
        return (
            f"nothing-moving: half of the time to learn masks is over, at {progress:.0%} of the "
            f"run, {shot.density:.1%} of the connections are live and 95 % of the mask variables "
            f"above {shot.quantiles[0]:.2g}. Raise lam or mask_lr."
        )

    def _flicker(
        self, learned: float, progress: float, shot: Snapshot, revivals: float | None
    ) -> str | None:
        """Masks that die may be λ at work; masks that keep coming back have not settled."""
        if revivals is None:
            return None
        share = revivals / sum(shot.connections.values())
        if 0.1 <= learned < 0.4:
            self._early_revivals = max(self._early_revivals or 0.0, share)
        early = self._early_revivals
        if learned < 0.5 or early is None or share < max(early, _FLICKER_SHARE):
            return None
        return (
            f"flicker: {share:.2%} of the masks came back in one step at {progress:.0%} of the "
            f"run, no fewer than early on ({early:.2%}). Lower mask_lr, or freeze masks earlier."
        )

    def _hovers(self, learned: float, last: float | None, hovering: float) -> str | None:
        """Judged just before the freeze, where what is up at that moment is what is kept."""
        if last is None or learned <= last or not _HOVERING_FROM <= last < learned <= 1:
            return None
        share = hovering * _PART / (learned - last)
        if share <= _HOVERING_SHARE:
            return None
        return (
            f"hovering: masks are about to be frozen, and in {_PART:.0%} of the time to learn them "
            f"{share:.0%} of the live connections still come and go: which are kept is partly "
            "chance. Freeze masks later, or keep more connections."
        )
