"""A traced network → the native runtime's steps: what can be part of another step is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from sclcore.export.folding import fold_batch_norm
from sclcore.export.native.building import filled, float32, pair, text_of
from sclcore.export.native.steps import Activation, Kind, Network, Pair, Step
from sclcore.export.native.tokens import TOKENS, Tokens
from sclcore.export.removal.program import Ref, trace
from sclcore.export.removal.program import Step as Operation

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
    "hardswish": Activation.HARDSWISH,
    "hardsigmoid": Activation.HARDSIGMOID,
    "gelu": Activation.GELU,
}
_LOWERED = {
    *("conv2d", "linear", "batch_norm", "relu", "relu6", "hardtanh", "clamp", "clamp_min", "add"),
    "sub",
    *("mul", "div", "mean", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "slice", "pad"),
    *("constant_pad_nd", "group_norm"),
    *TOKENS,
}


def lower(model: nn.Module, example: Tensor) -> Network:
    """The steps of `model` in evaluation, on images like those of `example` ([2 or more, …]).

    Batch norm is folded. Raises ExportError for a network that cannot be traced, or has an
    operator without a kernel, which it names.
    """
    folded, _, _ = fold_batch_norm(copy.deepcopy(model).double(), example)
    return _Lowering(trace(folded, example)).lower()


class _Lowering(Tokens):
    """A method for each operator, by the name that torch.export gives it."""

    def lower(self) -> Network:
        without = [o for o in self.lowered if o.op not in _ACTIVATIONS and o.op not in _LOWERED]
        if without:
            others = sorted({o.op for o in without if o.op[0] != "<"} - {without[0].op})
            more = f" (nor have {', '.join(others)})" if others else ""
            raise self.refused(without[0], f"has no kernel{more}")
        for operation in self.lowered:
            if operation.kwargs.get("approximate", "none") != "none":
                raise self.refused(operation, "by an approximation has no kernel")
            if operation.op in _ACTIVATIONS:
                self._activate(operation, _ACTIVATIONS[operation.op])
            else:
                getattr(self, f"_{operation.op}")(operation)
        return self.finish()

    def _conv2d(self, operation: Operation) -> None:
        source, weight, bias, stride, padding, dilation, groups = filled(
            operation.args, (None, None, None, (1, 1), (0, 0), (1, 1), 1)
        )
        self.map_of(operation)
        kernel = self.constant(weight)
        dilation = pair(dilation)
        if isinstance(padding, str):
            spans = [(k - 1) * d for k, d in zip(kernel.shape[2:], dilation, strict=True)]
            padding = [s // 2 if padding == "same" else 0 for s in spans]
        step = Step(
            Kind.CONV,
            self.of(source),
            -1,
            kernel=pair(kernel.shape[2:]),
            stride=pair(stride),
            dilation=dilation,
            before=pair(padding),
            groups=groups,
            weight=kernel,
            bias=self.bias_of(bias, len(kernel)),
        )
        self.add_step(operation, step)

    def _linear(self, operation: Operation) -> None:
        source, weight, bias = filled(operation.args, (None, None, None))
        matrix = self.constant(weight)
        if self.program.values[source.name].ndim == 3:
            step = Step(Kind.CONV, self.of(source), -1, weight=matrix[:, :, None, None])
            step.bias = self.bias_of(bias, len(matrix))
            self.add_step(operation, step)
            return
        if self.program.values[source.name].ndim != 2:
            raise self.refused(operation, "of the last of four dimensions has no kernel")
        step = Step(Kind.LINEAR, self.of(source), -1, weight=matrix)
        step.bias = self.bias_of(bias, len(matrix))
        self.add_step(operation, step)

    def _batch_norm(self, operation: Operation) -> None:
        weight, bias, mean, variance = operation.args[1:5]
        training, epsilon = operation.args[5], operation.args[7]
        if training or mean is None:
            raise self.refused(operation, "takes the statistics of the batch, not stored ones")
        scale = (self.program.value(variance) + epsilon).rsqrt()
        if weight is not None:
            scale = scale * self.program.value(weight)
        shift = -self.program.value(mean) * scale
        if bias is not None:
            shift = shift + self.program.value(bias)
        self.each_channel(operation, float32(scale), float32(shift))

    def _group_norm(self, operation: Operation) -> None:
        source, groups, weight, bias, epsilon, _ = filled(
            operation.args, (None, 1, None, None, 1e-5, True)
        )
        channels, _, _ = self.map_of(operation)
        step = Step(Kind.NORMALISE, self.of(source), -1, groups=groups, low=epsilon)
        self.add_step(operation, step)
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        scale = ones if weight is None else self.constant(weight)
        shift = zeros if bias is None else self.constant(bias)
        self.each_channel(operation, scale, shift, step.out)

    def _relu(self, operation: Operation) -> None:
        self._activate(operation, Activation.CLIP, 0.0)

    def _relu6(self, operation: Operation) -> None:
        self._activate(operation, Activation.CLIP, 0.0, 6.0)

    def _hardtanh(self, operation: Operation) -> None:
        _, low, high = filled(operation.args, (None, -1.0, 1.0))
        self._activate(operation, Activation.CLIP, float(low), float(high))

    def _clamp(self, operation: Operation) -> None:
        _, low, high = filled(operation.args, (None, None, None))
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        self._activate(operation, Activation.CLIP, float(ends[0]), float(ends[1]))

    def _clamp_min(self, operation: Operation) -> None:
        self._activate(operation, Activation.CLIP, float(operation.args[1]))

    def _add(self, operation: Operation) -> None:
        if operation.kwargs.get("alpha", 1) != 1:
            raise self.refused(operation, "with a factor has no kernel")
        one, other = operation.args
        if self._with_number(operation, lambda number: (1.0, number)):
            return
        if self.add_constants(operation):
            return
        self.check_equal_shapes(operation)
        tensors = [self.of(one), self.of(other)]
        # The convolution that comes last takes the other in before its activation.
        hosts = [
            (position, step)
            for position, step in enumerate(self.network.steps)
            if step.kind is Kind.CONV and step.plain and step.second < 0 and step.out in tensors
            if self.readers[self.root[(one if step.out == tensors[0] else other).name]] == 1
        ]
        if not hosts or tensors[0] == tensors[1]:
            self.add_step(operation, Step(Kind.ADD, tensors[0], -1, tensors[1]))
            return
        position, host = hosts[-1]
        host.second = tensors[1] if host.out == tensors[0] else tensors[0]
        # What it adds may be made after it: alone its result is read by this addition, it can wait.
        self.network.steps.append(self.network.steps.pop(position))
        self.tensor[operation.name] = host.out

    def _sub(self, operation: Operation) -> None:
        sign = 1.0 if isinstance(operation.args[0], Ref) else -1.0
        if not self._with_number(operation, lambda number: (sign, -sign * number)):
            raise self.refused(operation, "of two tensors has no kernel")

    def _mul(self, operation: Operation) -> None:
        if self._with_number(operation, lambda number: (number, 0.0)):
            return
        if self.scale_channels(operation):
            return
        one, other = operation.args
        maps: list[Any] = [self.program.values[ref.name].shape for ref in (one, other)]
        if maps[0] != maps[1] and math.prod(maps[0][2:]) == 1:
            one, other, maps = other, one, maps[::-1]
        if len(maps[1]) != 4 or maps[1][:2] != maps[0][:2] or math.prod(maps[1][2:]) != 1:
            raise self.refused(
                operation, f"of {text_of(maps[0])} and {text_of(maps[1])} has no kernel"
            )
        self.add_step(operation, Step(Kind.SCALE, self.of(one), -1, self.of(other)))

    def _div(self, operation: Operation) -> None:
        first, second = operation.args
        if isinstance(first, Ref) and self._with_number(
            operation, lambda number: (1 / number, 0.0)
        ):
            return
        raise self.refused(operation, f"by {type(second).__name__} has no kernel")

    def _mean(self, operation: Operation) -> None:
        _, dims, *_ = filled(operation.args, (None, None))
        if self.program.values[operation.args[0].name].ndim == 3 and list(dims or []) == [1]:
            self.add_step(operation, Step(Kind.MEAN, self.of(operation.args[0]), -1))
            return
        if self.map_of(operation) and sorted(d % 4 for d in dims or []) == [2, 3]:
            self.add_step(operation, Step(Kind.MEAN, self.of(operation.args[0]), -1))
            return
        raise self.refused(operation, "over other dimensions than height and width has no kernel")

    def _adaptive_avg_pool2d(self, operation: Operation) -> None:
        _, height, width = self.map_of(operation)
        wanted = pair(operation.args[1])
        if wanted == (1, 1):
            self.add_step(operation, Step(Kind.MEAN, self.of(operation.args[0]), -1))
        elif height % wanted[0] or width % wanted[1]:
            raise self.refused(
                operation, f"from {height}×{width} to {text_of(wanted)} has no kernel"
            )
        else:
            window = (height // wanted[0], width // wanted[1])
            self._average(operation, window, window, (0, 0))

    def _avg_pool2d(self, operation: Operation) -> None:
        _, window, stride, padding, ceil, padded, divisor = filled(
            operation.args, (None, None, None, (0, 0), False, True, None)
        )
        window, padding = pair(window), pair(padding)
        if ceil or divisor is not None or (padding != (0, 0) and not padded):
            raise self.refused(operation, "that counts pixels of the image alone has no kernel")
        self._average(operation, window, pair(stride or window), padding)

    def _max_pool2d(self, operation: Operation) -> None:
        _, window, stride, padding, dilation, _ = filled(
            operation.args, (None, None, None, (0, 0), (1, 1), False)
        )
        self.map_of(operation)
        if pair(dilation) != (1, 1):
            raise self.refused(operation, "with a dilation has no kernel")
        window = pair(window)
        step = Step(Kind.MAXPOOL, self.of(operation.args[0]), -1, kernel=window)
        step.stride, step.before = pair(stride or window), pair(padding)
        self.add_step(operation, step)

    def _slice(self, operation: Operation) -> None:
        _, dim, start, _, stride = filled(operation.args, (None, 0, None, None, 1))
        self.map_of(operation)
        if dim not in (2, 3) or start not in (None, 0):
            raise self.refused(operation, "that does not begin with the first pixel has no kernel")
        self._pixels(operation, stride=(stride, 1) if dim == 2 else (1, stride))

    def _pad(self, operation: Operation) -> None:
        _, sides, mode, value = filled(operation.args, (None, (), "constant", None))
        self.map_of(operation)
        left, _, top, _, first, _ = [*sides, 0, 0, 0, 0, 0, 0][:6]
        if mode != "constant" or value or min(*sides, 0) < 0 or len(sides) > 6:
            raise self.refused(operation, "with something else than zeros has no kernel")
        self._pixels(operation, before=(top, left), first=first)

    def _constant_pad_nd(self, operation: Operation) -> None:
        source, sides, value = filled(operation.args, (None, (), 0))
        args = (source, sides, "constant", value)
        self._pad(Operation(operation.name, "pad", operation.target, args, {}, operation.place))

    # What several of them are made of.

    def _activate(
        self,
        operation: Operation,
        activation: Activation,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> None:
        source = self.root[operation.args[0].name]
        host = next((s for s in self.network.steps if s.out == self.tensor[source]), None)
        if host is not None and host.plain and self.readers[source] == 1 and _can_end(host):
            self.tensor[operation.name] = host.out
        else:
            host = Step(Kind.ACTIVATE, self.tensor[source], -1)
            self.add_step(operation, host)
        host.activation, host.low, host.high = activation, low, high

    def _with_number(self, operation: Operation, factors: Callable[[float], Pair | Any]) -> bool:
        """Lower an operation of a tensor and a plain number, if it is one."""
        numbers = [a for a in operation.args if isinstance(a, int | float)]
        numbers += [
            self.program.values[a.name].item()
            for a in operation.args
            if isinstance(a, Ref) and a.name not in self.root
            if self.program.values[a.name].numel() == 1
        ]
        tensors = [a for a in operation.args if isinstance(a, Ref) and a.name in self.root]
        if len(numbers) != 1 or len(tensors) != 1:
            return False
        scale, shift = factors(float(numbers[0]))
        channels = self.network.tensors[self.of(tensors[0])][0]
        moved = Operation(
            operation.name, operation.op, operation.target, tuple(tensors), {}, operation.place
        )
        ones = np.ones(channels, np.float32)
        self.each_channel(moved, scale * ones, shift * ones)
        return True

    def _average(self, operation: Operation, window: Pair, stride: Pair, before: Pair) -> None:
        channels, _, _ = self.map_of(operation)
        step = Step(Kind.CONV, self.of(operation.args[0]), -1, kernel=window, stride=stride)
        step.before, step.groups = before, channels
        step.weight = np.full((channels, 1, *window), 1 / math.prod(window), np.float32)
        step.bias = np.zeros(channels, np.float32)
        self.add_step(operation, step)

    def _pixels(
        self,
        operation: Operation,
        stride: Pair = (1, 1),
        before: Pair = (0, 0),
        first: int = 0,
    ) -> None:
        """Some pixels as they are, at another place or as another channel: weights of 1."""
        name = self.root[operation.args[0].name]
        source = self.tensor[name]
        inputs, outputs = self.shape_of(name)[0], self.shape_of(operation.name)[0]
        weight = np.zeros((outputs, inputs, 1, 1), np.float32)
        kept = np.arange(inputs)
        weight[kept + first, kept] = 1
        step = Step(Kind.CONV, source, -1, stride=stride, before=before, weight=weight)
        step.bias = np.zeros(outputs, np.float32)
        made = self.network.steps[-1] if self.network.steps else None
        if (
            made is not None
            and made.out == source
            and self.readers[name] == 1
            and made.plain
            and made.name.startswith("select:")
            and before == (0, 0)
            and made.weight is not None
            and len(made.weight) == inputs
        ):
            # One selection after another, as slices of two dimensions are.
            self.network.steps.pop()
            step.source, step.before = made.source, made.before
            step.stride = (stride[0] * made.stride[0], stride[1] * made.stride[1])
            both = weight[..., 0, 0] @ made.weight[..., 0, 0]
            step.weight = both.reshape(outputs, -1, 1, 1)
        self.add_step(operation, step)
        step.name = f"select:{step.name}"


def _can_end(step: Step) -> bool:
    """Whether the step's kernel applies an activation."""
    return step.kind in (Kind.CONV, Kind.LINEAR, Kind.ADD, Kind.SCALE, Kind.ACTIVATE)
