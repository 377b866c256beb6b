"""How long each layer of a network takes here, by its numbers of input and output features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclcore.export.removal.program import Program
from sclcore.export.shrink.units import Layer

Timer = Callable[[Mapping[Any, Callable[[], object]]], Mapping[Any, float]]
"""Calls by name → milliseconds of each. To be measured in turn, so that drift hits all alike."""

SHARES = (1.0, 0.75, 0.5, 0.3, 0.15, 0.05)
"""Shares of a layer's features at which it is measured; it is interpolated between them."""


@dataclass(frozen=True)
class Shape:
    """A layer as it is computed, but for its numbers of features.

    `places` is the input's shape [batch, …] without its features, `per_group` the inputs that one
    output reads in a convolution in groups (None: all), `rest` what else the operation is given.
    """

    op: str
    places: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: bool
    per_group: int | None
    rest: tuple[Any, ...]


class LatencyTable:
    """Milliseconds of layers: measured on a grid and wherever asked, interpolated elsewhere."""

    def __init__(
        self,
        program: Program,
        layers: Iterable[Layer],
        *,
        batch: int,
        timer: Timer,
        dtype: torch.dtype,
    ) -> None:
        self._timer, self._dtype = timer, dtype
        self._shapes: dict[str, Shape] = {}
        self._targets: dict[Shape, Callable[..., object]] = {}
        self._axes: dict[Shape, tuple[list[int], list[int]]] = {}
        self._measured: dict[tuple[Shape, int, int], float] = {}
        grid = []
        for layer in layers:
            shape = _shape_of(program, layer, batch)
            self._shapes[layer.step.name] = shape
            self._targets[shape] = layer.step.target
            grid += self._grid(shape, len(layer.inputs), len(layer.outputs))
        self.measure(grid)

    def _grid(self, shape: Shape, inputs: int, outputs: int) -> list[tuple[Shape, int, int]]:
        ins, outs = ({max(1, round(share * n)) for share in SHARES} for n in (inputs, outputs))
        if shape.per_group:
            # In whole groups, in and out together.
            groups = inputs // shape.per_group
            counts = sorted({max(1, round(share * groups)) for share in SHARES})
            points = [(n * shape.per_group, n * outputs // groups) for n in counts]
            return [(shape, i, o) for i, o in points]
        known = self._axes.get(shape, ([], []))
        self._axes[shape] = sorted({*known[0], *ins}), sorted({*known[1], *outs})
        return [(shape, i, o) for i in self._axes[shape][0] for o in self._axes[shape][1]]

    def point(self, layer: Layer, inputs: int, outputs: int) -> tuple[Shape, int, int]:
        """The point of `layer` with so many features."""
        return self._shapes[layer.step.name], inputs, outputs

    def measure(self, points: Iterable[tuple[Shape, int, int]]) -> None:
        """Measure these points themselves, where they are not yet."""
        wanted = {p: self._call(*p) for p in points if p not in self._measured}
        if wanted:
            self._measured |= dict(self._timer(wanted))

    def _call(self, shape: Shape, inputs: int, outputs: int) -> Callable[[], object]:
        """The layer with so many features and random numbers."""
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(self._dtype)

        target, rest = self._targets[shape], list(shape.rest)
        columns = shape.per_group or inputs
        weight = random(outputs, columns, *shape.kernel)
        bias = random(outputs) if shape.bias else None
        if shape.op == "linear":
            x = random(*shape.places, inputs)
            return lambda: target(x, weight, bias)
        x = random(shape.places[0], inputs, *shape.places[1:])
        if shape.per_group:
            rest[-1] = inputs // shape.per_group
        return lambda: target(x, weight, bias, *rest)

    def milliseconds(self, layer: Layer, inputs: int, outputs: int) -> float:
        """Of `layer` with so many input and output features."""
        shape = self._shapes[layer.step.name]
        exact = self._measured.get((shape, inputs, outputs))
        if exact is not None:
            return exact
        if shape.per_group:
            known = sorted((o, ms) for (s, _, o), ms in self._measured.items() if s == shape)
            return float(np.interp(outputs, [o for o, _ in known], [ms for _, ms in known]))
        ins, outs = self._axes[shape]
        columns = [
            np.interp(outputs, outs, [self._measured[shape, i, o] for o in outs])
            for i in _around(ins, inputs)
        ]
        return float(np.interp(inputs, _around(ins, inputs), columns))

    @property
    def points(self) -> int:
        """How many were measured."""
        return len(self._measured)


def _around(axis: list[int], value: int) -> list[int]:
    """The one or two numbers of a sorted `axis` between which `value` lies."""
    above = int(np.searchsorted(axis, value))
    return [axis[i] for i in sorted({max(0, above - 1), min(above, len(axis) - 1)})]


def _shape_of(program: Program, layer: Layer, batch: int) -> Shape:
    step = layer.step
    x, weight = program.value(step.args[0]), program.value(step.args[1])
    # The traced pass has one sample; a layer may see several places of it as a batch.
    first = x.shape[0] * batch
    linear = step.op == "linear"
    places = (first, *x.shape[1:-1]) if linear else (first, *x.shape[2:])
    bias = len(step.args) > 2 and step.args[2] is not None
    rest = () if linear else _rest(step.args[3:], weight.ndim - 2, layer.groups)
    return Shape(
        op=step.op,
        places=tuple(places),
        kernel=tuple(weight.shape[2:]),
        bias=bias,
        per_group=weight.shape[1] if layer.groups > 1 else None,
        rest=rest,
    )


def _rest(arguments: Iterable[Any], dimensions: int, groups: int) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups, hashable; what the graph leaves out is default."""
    given = [tuple(a) if isinstance(a, list) else a for a in arguments]
    defaults = [(1,) * dimensions, (0,) * dimensions, (1,) * dimensions, groups]
    return (*given, *defaults[len(given) :])[:4]
