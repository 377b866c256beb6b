"""A traced network on its way to steps: which tensor each of its values is, and who reads it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclcore.export.files import ExportError
from sclcore.export.native.attention import attention_views
from sclcore.export.native.steps import Kind, Network, Pair, Shape, Step
from sclcore.export.removal.program import Program, Ref
from sclcore.export.removal.program import Step as Operation

WHAT_RUNS = "the native runtime runs convolutional networks, MLPs and ViTs"
_SAME = {
    *("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy"),
    *("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "to", "_to_copy"),
}


class Builder:
    """The steps so far of the network that `program` is.

    `lowered` are the operations that depend on the images and are more than another view of
    what they read; `root` maps each value to the one that it is a view of, `tensor` those to the
    numbers of their tensors, and `readers` counts the operations that read each.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.network = Network()
        self.operations = {operation.name: operation for operation in program.steps}
        self.tensor: dict[str, int] = {}
        self.readers: Counter[str] = Counter()
        # Views that another order of the numbers is behind: who reads them has looked at it.
        self.known_views = attention_views(program)
        self._find_readers()
        [images] = program.inputs
        if program.values[images].ndim == 3:
            raise ExportError(f"{WHAT_RUNS} of images, not of tokens")
        self.network.source = self.tensor[images] = self.network.new(self.shape_of(images))

    def finish(self) -> Network:
        """The network, when all of `lowered` are steps."""
        for name in self.root:
            self._check_view(name)
        [out] = self.program.outputs
        self.network.out = self.of(Ref(out))
        if self.program.values[out].ndim == 3:
            raise ExportError(f"{WHAT_RUNS} that give one vector or map, not tokens")
        self.network.out_shape = tuple(self.program.values[out].shape[1:])
        return self.network

    def _find_readers(self) -> None:
        """What depends on the images, and how many operations read each of it."""
        if len(self.program.inputs) != 1 or len(self.program.outputs) != 1:
            raise ExportError(f"{WHAT_RUNS} of one input and one output")
        self.root = {self.program.inputs[0]: self.program.inputs[0]}
        self.lowered: list[Operation] = []
        for operation in self.program.steps:
            read = [ref.name for ref in operation.refs() if ref.name in self.root]
            if not read:
                continue
            if operation.op in _SAME or operation.name in self.known_views:
                self.root[operation.name] = self.root[read[0]]
                continue
            self.root[operation.name] = operation.name
            self.lowered.append(operation)
            self.readers.update(self.root[name] for name in read)
        if self.program.outputs[0] not in self.root:
            raise ExportError("the network's output does not depend on the images")
        self.readers[self.root[self.program.outputs[0]]] += 1

    def add_step(self, operation: Operation, step: Step) -> None:
        shape = self.shape_of(operation.name)
        step.out = self.tensor[operation.name] = self.network.new(shape)
        step.name = operation.place.name or operation.name
        for values in (step.weight, step.bias):
            if values is not None and not np.isfinite(values).all():
                raise ExportError(f"{step.name} has weights that are not finite (NaN or infinite)")
        if step.kind is Kind.CONV and shape[1] == shape[2] == 1:
            _make_linear(step, self.network.tensors[step.source])
        self.network.steps.append(step)

    def shape_of(self, name: str) -> Shape:
        """Of the tensor of a value: [batch, channels, height, width], [batch, features], or tokens
        [batch, tokens, channels], which are a map of one row."""
        value = self.program.values[name]
        batch = self.program.values[self.program.inputs[0]].shape[0]
        if not isinstance(value, Tensor) or not 2 <= value.ndim <= 4 or value.shape[0] != batch:
            shape = text_of(value.shape) if isinstance(value, Tensor) else type(value).__name__
            what = self.operations[name].op if name in self.operations else "the input"
            raise ExportError(f"{what} gives {shape}, which is no batch of maps or vectors")
        if value.ndim == 3:
            return value.shape[2], 1, value.shape[1]
        return tuple([*value.shape[1:], 1, 1][:3])  # type: ignore[return-value]

    def _check_view(self, name: str) -> None:
        """A view may drop or add dimensions of 1, or make one vector of a map."""
        if name not in self.operations or self.operations[name].op not in _SAME:
            return
        if name in self.known_views:
            return
        root = self.program.values[self.root[name]]
        tensor = self.network.tensors[self.tensor[self.root[name]]]
        value = self.program.values[name]
        batch = self.program.values[self.program.inputs[0]].shape[0]
        sizes = [size for size in value.shape[1:] if size > 1]
        full = [size for size in tensor if size > 1]
        if 3 in (value.ndim, root.ndim):
            # Tokens have their channels last, and here first.
            if value.shape != root.shape:
                raise self.refused(
                    self.operations[name], f"to {text_of(value.shape)} has no kernel"
                )
            return
        if value.shape[0] != batch or sizes not in (full, [math.prod(tensor)] * (len(full) > 0)):
            raise self.refused(self.operations[name], f"to {text_of(value.shape)} has no kernel")

    def of(self, ref: Ref) -> int:
        if not isinstance(ref, Ref) or ref.name not in self.root:
            raise ExportError("an operation of constants and images has no kernel")
        return self.tensor[self.root[ref.name]]

    def map_of(self, operation: Operation) -> Shape:
        """The shape of its first argument, which must be a map as it lies in memory."""
        ref = operation.args[0]
        value, tensor = self.program.values[ref.name], self.network.tensors[self.of(ref)]
        if value.ndim != 4 or tuple(value.shape[1:]) != tensor:
            raise self.refused(operation, f"of {text_of(value.shape)} has no kernel")
        return tensor

    def check_equal_shapes(self, operation: Operation) -> None:
        refs = [a for a in operation.args if isinstance(a, Ref) and a.name in self.root]
        shapes = [self.network.tensors[self.of(ref)] for ref in refs]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            shapes = [tuple(self.program.value(a).shape) for a in operation.args]
            raise self.refused(operation, f"of {' and '.join(map(text_of, shapes))} has no kernel")

    def constant(self, argument: Any) -> Any:
        if not isinstance(argument, Ref) or argument.name in self.root:
            raise ExportError("weights that depend on the images have no kernel")
        return float32(self.program.value(argument))

    def bias_of(self, argument: Any, outputs: int) -> Any:
        return np.zeros(outputs, np.float32) if argument is None else self.constant(argument)

    def each_channel(
        self, operation: Operation, scale: Any, shift: Any, source: int | None = None
    ) -> None:
        """scale · x + shift with a number for each channel; x is `source`, or what it reads."""
        source = self.of(operation.args[0]) if source is None else source
        channels, height, width = self.network.tensors[source]
        if self.shape_of(operation.name)[0] != channels:
            raise self.refused(operation, "of a flattened map has no kernel")
        if height == width == 1:
            step = Step(Kind.LINEAR, source, -1, weight=np.diag(scale))
        else:
            step = Step(Kind.CONV, source, -1, groups=channels)
            step.weight = scale.reshape(channels, 1, 1, 1)
        step.bias = shift
        self.add_step(operation, step)

    def refused(self, operation: Operation, why: str) -> ExportError:
        where = f" ({operation.place.name})" if operation.place.name else ""
        return ExportError(f"the operator {operation.op}{where} {why}: {WHAT_RUNS}")


def _make_linear(step: Step, source: Shape) -> None:
    """A convolution with one output pixel, as a Linear layer over its whole input."""
    assert step.weight is not None
    outputs, fan_in, _, _ = step.weight.shape
    channels, height, width = source
    whole = np.zeros((outputs, channels, height, width), np.float32)
    for ky in range(step.kernel[0]):
        for kx in range(step.kernel[1]):
            y = ky * step.dilation[0] - step.before[0]
            x = kx * step.dilation[1] - step.before[1]
            if not (0 <= y < height and 0 <= x < width):
                continue
            for group in range(step.groups):
                rows = slice(group * outputs // step.groups, (group + 1) * outputs // step.groups)
                columns = slice(group * fan_in, (group + 1) * fan_in)
                whole[rows, columns, y, x] = step.weight[rows, :, ky, kx]
    step.kind, step.weight = Kind.LINEAR, whole.reshape(outputs, -1)
    step.kernel = step.stride = step.dilation = (1, 1)
    step.before, step.groups = (0, 0), 1
    if step.second >= 0:
        raise AssertionError("a residual is added later")


def filled(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args, *defaults[len(args) :])


def pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[-1])


def float32(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())


def text_of(shape: Any) -> str:
    return "×".join(map(str, shape))
