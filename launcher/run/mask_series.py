"""What the masks of a run are doing: series for the tracker, warnings by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.tracking import Histogram
from sclcore.optim.sparse import SparseOptimizer
from sclcore.telemetry import (
    HISTOGRAM_EDGES,
    FlipCounter,
    MaskHealth,
    Snapshot,
    connection_metrics,
    hovering,
    observation_metrics,
    revivals,
    snapshot,
)

_log = logging.getLogger("scl")

_OF_LAYERS = ("density/", "macs/", "imbalance/")
# Mask variables that are sampled for a line: with so many, the median is off by half a percentile.
_SAMPLE = 8_192


class MaskSeries:
    """Watches the masks in the optimizer of a run, whatever its method; a dense run has few series.

    `line` is collective. Warnings are logged on rank 0.
    """

    def __init__(self, inputs: Inputs, learner: Learner) -> None:
        self._optimizer = learner.optimizer
        self._is_main = learner.world.is_main
        self._inputs = inputs
        self._budgets = learner.budgets
        self._health = MaskHealth(inputs.recipe.schedule.freeze_masks_at)
        self._held: set[str] = set()
        self._of_layers: dict[str, float] = {}
        self._of_network: dict[str, float] = {}
        self._histogram: Histogram | None = None
        self._flips = None
        if isinstance(self._optimizer, SparseOptimizer):
            self._flips = FlipCounter(self._optimizer)

    def state(self) -> dict[str, Any]:
        """What this rank has gathered since the last line: the tensors in use, not copies."""
        flips = self._flips.state() if self._flips else {}
        return {"held": sorted(self._held), "flips": flips}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Undo `state`; None: the next line is about the updates from here on."""
        self._held = set(state["held"]) if state else set()
        if self._flips:
            self._flips.restore(state["flips"] if state else None)

    def before_step(self, *, logged: bool) -> None:
        """Observe the step that is about to be logged."""
        if isinstance(self._optimizer, SparseOptimizer):
            self._optimizer.observing = logged
            self._optimizer.observations = {}

    def after_step(self) -> None:
        if isinstance(self._optimizer, SparseOptimizer):
            self._held.update(self._optimizer.held_layers)

    def line(self, step: int) -> dict[str, float]:
        """The series of a logged interval, which ends with update `step`, counted from 1."""
        group = self._optimizer.param_groups[0]
        series = {key: float(group[key]) for key in ("lr", "lam", "mask_lr") if key in group}
        live: dict[str, int] = {}
        flips = self._flips.take() if self._flips else {}
        if isinstance(self._optimizer, SparseOptimizer):
            series |= self._optimizer.metrics()
            shot = snapshot(self._optimizer, _SAMPLE, recount=False)
            live = self._optimizer.live_connections() if shot is None else shot.live
            flips["masks/hovering"] = hovering(flips["masks/revivals"], live)
            if shot is not None:
                observations = self._optimizer.observations
                self._histogram = Histogram(shot.histogram, HISTOGRAM_EDGES)
                self._warn(step, shot, revivals(observations), flips["masks/hovering"])
                series |= shot.metrics() | observation_metrics(observations)
            series |= flips
        if self._is_main:
            series |= connection_metrics(self._budgets, live)
        self._held.clear()
        # A layer's numbers are logged once an epoch only: a tracker needs time for each.
        self._of_layers = {k: v for k, v in series.items() if k.startswith(_OF_LAYERS)}
        self._of_network = {k: v for k, v in series.items() if k.startswith("connections/")}
        return {key: value for key, value in series.items() if key not in self._of_layers}

    def epoch(self) -> dict[str, Any]:
        """What is logged with an evaluation: series of the last line, of the same update."""
        series: dict[str, Any] = self._of_network | self._of_layers
        return series if self._histogram is None else {**series, "masks/histogram": self._histogram}

    def _warn(self, step: int, shot: Snapshot, came_back: float | None, hovering: float) -> None:
        share = self._inputs.place(step) / self._inputs.total_steps
        warnings = self._health.check(
            share,
            shot,
            held_layers=sorted(self._held),
            revivals=came_back,
            hovering=hovering,
        )
        for warning in warnings if self._is_main else ():
            _log.warning("%s", warning)
