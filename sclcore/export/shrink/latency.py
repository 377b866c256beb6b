"""The least valuable features leave a network until it is fast enough.

The idea is that of HFP (Yu et al., ICPR 2020): a table of measured latencies, and filters ranked
over all layers until the budget holds. Its score and its search are not public: both here are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from sclcore.export.cutting import apply_cut
from sclcore.export.shrink.latency_table import LatencyTable, Timer
from sclcore.export.shrink.units import Layer, Units

CALIBRATING = (1.0, 0.75, 0.5, 0.3, 0.0)
"""Shares of the units in the networks that are measured whole; of the last, one unit a layer."""
_ROUNDS, _WHOLE_ROUNDS = 8, 4
_CLOSE = 0.02  # a promise that is so near to the budget is good enough
_INSIDE = 0.995


@dataclass(frozen=True)
class Promise:
    """What goes (bool [units]), the milliseconds that the rest should take, and those it takes.

    `milliseconds` were promised before that network was `measured`.
    """

    gone: Tensor
    milliseconds: float
    measured: float


class LatencyModel:
    """Milliseconds of the networks that can be cut out of `model`, by what is measured here.

    Σ layers (from the table) · α + a + b · numbers computed beside layers, where α, a and b are
    fitted to whole networks of several widths: they hold what a layer alone does not show, such as
    memory that is cold, norms and activations, and Python's own time.

    `timer` measures as the network itself will be measured: threads, batch, precision. `measured`
    are milliseconds of the calibrating networks, the whole one first, the smallest last.
    """

    def __init__(self, model: nn.Module, units: Units, images: Tensor, timer: Timer) -> None:
        self.units = units
        self._model, self._images, self._timer = model, images, timer
        self.layers = units.layers()
        self._elements = units.elements()
        self._columns = [_Columns(layer, units.count) for layer in self.layers]
        dtype = next(model.parameters()).dtype
        self.table = LatencyTable(
            units.program, self.layers, batch=len(images), timer=timer, dtype=dtype
        )
        kept = [_uniform(units, share) for share in CALIBRATING]
        calls = {i: _call(_smaller(model, units, ~k), images) for i, k in enumerate(kept)}
        timed = timer(calls)
        self.measured = [timed[i] for i in range(len(kept))]
        self.table.measure(point for k in kept for point in self._points(k))
        self.alpha, self.fixed, self.per_element = self._fit(kept)
        self._correction = 1.0

    def _fit(self, kept: Sequence[Tensor]) -> tuple[float, float, float]:
        rows = np.array([[self._in_layers(k), 1.0, self._beside(k)] for k in kept])
        measured = np.array(self.measured)
        # Relative errors count: each row divided by what was measured.
        scaled = rows / measured[:, None]
        scale = np.abs(scaled).max(0).clip(min=1e-30)
        found, _ = nnls(scaled / scale, np.ones(len(measured)))
        alpha, fixed, per_element = (float(v) for v in found / scale)
        return alpha, fixed, per_element

    def milliseconds(self, kept: Tensor) -> float:
        """Of the network of the units `kept` (bool [units])."""
        beside = self.fixed + self.per_element * self._beside(kept)
        return self._correction * (self.alpha * self._in_layers(kept) + beside)

    def refine(self, kept: Tensor) -> float:
        """`milliseconds`, once each layer of that network has been measured as it is there."""
        self.table.measure(self._points(kept))
        return self.milliseconds(kept)

    def whole(self, kept: Tensor) -> float:
        """That network itself, measured; what is promised from now on is corrected by it."""
        promised = self.milliseconds(kept)
        network = _smaller(self._model, self.units, ~kept)
        measured = self._timer({0: _call(network, self._images)})[0]
        self._correction *= measured / promised
        return measured

    def _points(self, kept: Tensor) -> list[Any]:
        return [
            self.table.point(layer, *columns.sizes(kept))
            for layer, columns in zip(self.layers, self._columns, strict=True)
        ]

    def _in_layers(self, kept: Tensor) -> float:
        return sum(
            self.table.milliseconds(layer, *columns.sizes(kept))
            for layer, columns in zip(self.layers, self._columns, strict=True)
        )

    def _beside(self, kept: Tensor) -> float:
        return float(self._elements[kept].sum())

    def savings(self, kept: Tensor) -> Tensor:
        """Milliseconds that each unit costs, [units]: the mean over one half of its layers' width.

        Over a half, because a single feature more or less makes steps that are no trend.
        """
        total = self.per_element * self._elements.double()
        for layer, columns in zip(self.layers, self._columns, strict=True):
            inputs, outputs = columns.sizes(kept)
            now = self.table.milliseconds(layer, inputs, outputs)
            half = max(1, outputs // 2), max(1, inputs // 2)
            of_output = (now - self.table.milliseconds(layer, inputs, half[0])) / half[0]
            of_input = (now - self.table.milliseconds(layer, half[1], outputs)) / half[1]
            total += self.alpha * max(0.0, of_output) * columns.outputs
            # In a convolution in groups those that are read are those that are made.
            if layer.groups == 1:
                total += self.alpha * max(0.0, of_input) * columns.inputs
        return total.clamp_min(float(total.max()) * 1e-3)


class _Columns:
    """How many input and output features of a layer each unit has, [units]."""

    def __init__(self, layer: Layer, count: int) -> None:
        self.inputs, self.outputs = (
            torch.bincount(units[units >= 0], minlength=count)
            for units in (layer.inputs, layer.outputs)
        )
        self._always = int((layer.inputs < 0).sum()), int((layer.outputs < 0).sum())

    def sizes(self, kept: Tensor) -> tuple[int, int]:
        """Input and output features where the units `kept` are left."""
        inputs, outputs = int(self.inputs[kept].sum()), int(self.outputs[kept].sum())
        return self._always[0] + inputs, self._always[1] + outputs


def fit_into(
    latency: LatencyModel,
    scores: Tensor,
    budget: float,
    say: Callable[[str], object] = lambda _: None,
) -> Promise:
    """Which units go so that the network takes `budget` milliseconds at most.

    By ascending `scores` (what the loss of a unit may cost, [units]) per millisecond that the unit
    takes. The choice is measured whole; where the promise was another, the next promises are
    corrected by that and the search is repeated. Every tensor keeps one feature. What is returned
    takes more than the budget only where no other choice was found.
    """
    keep = latency.units.best_of_each_dimension(scores)
    every = torch.ones(latency.units.count, dtype=torch.bool)
    worth = (scores.double() / latency.savings(every)).masked_fill(keep, torch.inf)
    order = worth.argsort(stable=True)[: int((~keep).sum())]
    found: list[Promise] = []
    for _ in range(_WHOLE_ROUNDS):
        kept = _search(latency, order, budget)
        promised = latency.milliseconds(kept)
        promise = Promise(~kept, promised, latency.whole(kept))
        found.append(promise)
        say(
            f"  {int(kept.sum()):,} of {len(kept):,} units: promised {promised:.4g} ms, measured "
            f"{promise.measured:.4g} ms"
        )
        if 1 - 2 * _CLOSE < promise.measured / budget < 1 + _CLOSE:
            break
    fast = [p for p in found if p.measured < (1 + _CLOSE) * budget]
    return max(fast, key=_measured) if fast else min(found, key=_measured)


def _measured(promise: Promise) -> float:
    return promise.measured


def _search(latency: LatencyModel, order: Tensor, budget: float) -> Tensor:
    """The units that are left of a network that is promised to be within `budget`, if any is.

    The layers of each choice are measured as they are; where that makes the promise another, the
    search goes on from there.
    """
    aim, best = budget, None
    for _ in range(_ROUNDS):
        kept = _first_within(latency, order, aim)
        promised = latency.refine(kept)
        if promised <= budget and (best is None or promised > best[0]):
            best = promised, kept
        if best is not None and best[0] > (1 - _CLOSE) * budget:
            break
        aim *= min(1.2, max(0.8, _INSIDE * budget / promised))
    if best is not None:
        return best[1]
    kept = torch.ones(latency.units.count, dtype=torch.bool)
    kept[order] = False
    latency.refine(kept)
    return kept


def _first_within(latency: LatencyModel, order: Tensor, aim: float) -> Tensor:
    """The units that are left where the fewest of `order` go that bring it below `aim`."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        kept = torch.ones(latency.units.count, dtype=torch.bool)
        kept[order[:middle]] = False
        low, high = (low, middle) if latency.milliseconds(kept) <= aim else (middle + 1, high)
    kept = torch.ones(latency.units.count, dtype=torch.bool)
    kept[order[:low]] = False
    return kept


def _uniform(units: Units, share: float) -> Tensor:
    """The units that are left in a network whose layers all have `share` of their features."""
    places = torch.ones(units.count)
    for _, dim, of in units.dimensions():
        own = of[of >= 0].unique()
        if dim == 0 and len(own):
            places[own] = torch.minimum(places[own], (torch.arange(len(own)) + 0.5) / len(own))
    return (places <= share) | units.best_of_each_dimension(-places)


def _smaller(model: nn.Module, units: Units, gone: Tensor) -> nn.Module:
    smaller = copy.deepcopy(model).eval().requires_grad_(False)
    apply_cut(smaller, units.cut(gone))
    return smaller


def _call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images)
