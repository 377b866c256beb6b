"""The units of a network: features that can be taken out of it, and the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sclcore.export.cut import Cut
from sclcore.export.files import ExportError
from sclcore.export.removal.dependence import touching_taps
from sclcore.export.removal.features import Features, Reading
from sclcore.export.removal.operations import Kind, kind_of
from sclcore.export.removal.program import Program, Ref, Step, trace
from sclcore.export.removal.surgery import cut_of

NONE = -1  # an input or output feature that belongs to no unit


@dataclass(frozen=True)
class Reader:
    """A Linear or convolution that reads units: `units` of its input features, or NONE.

    The features lie along dimension `dim` of its input. `padded`: it reads zeros beside the images.
    """

    module: str
    weight: str
    units: Tensor
    dim: int
    padded: bool


@dataclass(frozen=True)
class Layer:
    """A Linear or convolution as one pass computes it: the step, and the units of its features."""

    step: Step
    weight: str
    inputs: Tensor
    outputs: Tensor
    groups: int


class Units:
    """What can be taken out of `model`: neurons, channels, heads, each with all that is tied to it.

    Unit u of `count` is a group of features that go together. Those that the network's outputs or
    its code need (`Features.frozen`), and those that something else than a Linear or a convolution
    reads, are no units. `example_input` is a tensor or tuple of positional arguments, batch size 1.
    ExportError where the model cannot be traced, or nothing of it can go.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.program: Program = trace(model, example_input)
        self.features = Features(self.program)
        self._roots = self._find_roots()
        self.count = len(self._roots)
        if not self.count:
            raise ExportError(
                f"{type(model).__name__} has no feature that could go: each one reaches the "
                "outputs, a norm or code that needs its number of features"
            )
        self._unit_of = torch.full((self.features.count(),), NONE)
        self._unit_of[self._roots] = torch.arange(self.count)
        self.readers = [self._reader(reading) for reading in self.features.readings]
        self.readers = [r for r in self.readers if bool((r.units >= 0).any())]

    def _find_roots(self) -> Tensor:
        features, program = self.features, self.program
        read, staying = set(), set(features.frozen())
        for reading in features.readings:
            roots = set(features.roots(reading.labels).tolist())
            if _module_of(program, reading.step) is None:
                staying |= roots
            read |= roots
        made = set()
        for axes in features.axes.values():
            if 0 in axes:
                made |= set(features.roots(axes[0]).tolist())
        return torch.tensor(sorted((read & made) - staying), dtype=torch.long)

    def _reader(self, reading: Reading) -> Reader:
        step, program = reading.step, self.program
        weight = program.parameters[step.args[1].name]
        dim, padded = -1, False
        if step.op != "linear":
            dim, padded = 1, touching_taps(step, program.value(step.args[1]).shape[2:]) is not None
        return Reader(weight.rpartition(".")[0], weight, self.of(reading.labels), dim, padded)

    def of(self, labels: Tensor) -> Tensor:
        """The units of labels of `features`; NONE where one is of no unit."""
        roots = self.features.roots(labels)
        return torch.where(roots < 0, roots, self._unit_of[roots.clamp_min(0)])

    def dimensions(self) -> Iterator[tuple[str, int, Tensor]]:
        """Parameter, dimension, and the unit of each of its indices."""
        for name, axes in self.features.axes.items():
            for dim, labels in axes.items():
                yield name, dim, self.of(labels)

    def layers(self) -> list[Layer]:
        """Every Linear and convolution of the pass, in order."""
        found = []
        for step in self.program.steps:
            if kind_of(step, self.program) is not Kind.LAYER:
                continue
            weight = self.program.parameters[step.args[1].name]
            axes, shape = self.features.axes[weight], self.program.value(step.args[1]).shape
            dim = -1 if step.op == "linear" else 1
            inputs = self.program.value(step.args[0]).shape[dim]
            outputs = self.of(axes[0])
            columns = axes.get(1)
            # A convolution in groups passes its features on: those it reads are those it makes.
            read = self.of(columns) if columns is not None else _as_many(outputs, inputs)
            found.append(Layer(step, weight, read, outputs, inputs // shape[1]))
        return found

    def elements(self) -> Tensor:
        """How many numbers of one sample, beside layers, are computed for each unit: float [count].

        Of activations, norms, pooling, sums: what takes time in proportion to its size.
        """
        total = torch.zeros(self.count)
        for step in self.program.steps:
            value = self.program.values[step.name]
            if kind_of(step, self.program) in (Kind.LAYER, Kind.MOVE):
                continue
            if isinstance(value, Tensor):
                labels = self.features.labels(Ref(step.name))
                units = self.of(labels.expand(value.shape).reshape(-1))
                total += torch.bincount(units[units >= 0], minlength=self.count)
        return total

    def best_of_each_dimension(self, scores: Tensor) -> Tensor:
        """bool [count]: the units without which a tensor would be empty, the best by `scores`."""
        kept = torch.zeros(self.count, dtype=torch.bool)
        for _, _, units in self.dimensions():
            own = units[units >= 0].unique()
            if len(own) and bool((units >= 0).all()) and not kept[own].any():
                kept[own[scores[own].argmax()]] = True
        return kept

    def closed(self, live: Mapping[str, Tensor]) -> Tensor:
        """bool [count]: the units none of whose features is live, as gates or masks have found.

        `live` says of a layer's weight which output features are live (bool, [out]). A unit that
        several of these layers make goes where all of them have closed it; one that none makes
        stays, and so does the first of a tensor that would be empty.
        """
        made = torch.zeros(self.count, dtype=torch.bool)
        alive = torch.zeros(self.count, dtype=torch.bool)
        for weight, live_outputs in live.items():
            units = self.of(self.features.axes[weight][0])
            own = units >= 0
            made[units[own]] = True
            alive[units[own & live_outputs.cpu()]] = True
        return made & ~alive & ~self.best_of_each_dimension(alive.float())

    def cut(self, gone: Tensor, model: str = "") -> Cut:
        """The cut that takes the units `gone` (bool [count]) out."""
        removed = torch.zeros(self.features.count(), dtype=torch.bool)
        removed[self._roots[gone]] = True
        return cut_of(self.features, removed, model)


def _module_of(program: Program, step: Step) -> nn.Module | None:
    """The Linear or convolution that makes `step` with its own weight; None where it is another."""
    name = program.parameters[step.args[1].name]
    module = program.model.get_submodule(name.rpartition(".")[0])
    plain = isinstance(module, nn.Linear | _ConvNd) and name.rpartition(".")[2] == "weight"
    return module if plain and step.place.name == name.rpartition(".")[0] else None


def _as_many(outputs: Tensor, inputs: int) -> Tensor:
    """The units of `inputs` features, of which the layer makes `outputs`, group by group."""
    places = torch.arange(inputs) * len(outputs) // inputs
    return outputs[places]
