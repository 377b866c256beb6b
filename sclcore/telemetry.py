"""What the masks are doing: densities, flips, imbalance of features, and warnings by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sclcore.optimizer import SCL, Observation

# The thresholds of the failure modes; each is a judgement, not a law.
_NEAR = 0.1
_UNMOVED_SHARE = 0.999
_COLLAPSE_WITHIN = 0.02
_FLICKER_SHARE = 0.01


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


def snapshot(optimizer: SCL, sample: int = 1_000_000) -> Snapshot:
    """Counts are exact; quantiles come from about `sample` evenly spaced mask variables.

    Collective where state is sharded.
    """
    groups = [group for group in optimizer.param_groups if group["connections"]]
    live = optimizer.live_connections()
    sizes = {
        name: math.prod(shape)
        for group in groups
        for name, shape in zip(group["names"], group["shapes"], strict=True)
    }
    init = groups[0]["mask_init"]
    values = optimizer.sample_mask_variables(sample)
    if not len(values):
        return Snapshot(live, sizes, 0.0, (init, init, init), init)
    low, median, high = (
        float(values.kthvalue(1 + round(q * (len(values) - 1))).values) for q in (0.05, 0.5, 0.95)
    )
    near = float((values.abs() < _NEAR).float().mean())
    return Snapshot(live, sizes, near, (low, median, high), init)


def observation_metrics(observations: Mapping[str, Observation]) -> dict[str, float]:
    """Flips and imbalance of one observed step (`SCL.observing`), as flat series.

    Imbalance is the largest rms of a feature's mask gradient over the median one, within a layer;
    the worst layer is reported. Without normalisation it is what λ would have to be fair to. Dead
    features are those that receive no mask gradient at all.
    """
    if not observations:
        return {}
    return {
        "masks/flips": float(sum(o.flips for o in observations.values())),
        "masks/revivals": float(sum(o.revivals for o in observations.values())),
        "masks/imbalance_before": max(_imbalance(o.rms_before) for o in observations.values()),
        "masks/imbalance_after": max(_imbalance(o.rms_after) for o in observations.values()),
        "masks/dead_features": float(
            sum(int((o.rms_before == 0).sum()) for o in observations.values())
        ),
    }


def _imbalance(rms: Tensor) -> float:
    alive = rms[rms > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0


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

    def check(
        self,
        progress: float,
        shot: Snapshot,
        *,
        held_layers: list[str] | None = None,
        revivals: float | None = None,
    ) -> list[str]:
        """`revivals`: masks that came to life in one recent step, while masks are learned."""
        learned = progress / self.freeze_at if self.freeze_at else 1.0
        found = {
            "lambda-too-large": self._too_large(progress, shot),
            "nothing-moving": self._unmoved(learned, progress, shot),
            "flicker": self._flicker(learned, progress, shot, revivals),
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
