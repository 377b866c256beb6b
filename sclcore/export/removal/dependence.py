"""Which elements of the network's tensors depend on its input, and which the output depends on.

Each operation is replaced by a positive linear one with the same dependencies: a convolution by one
whose weights are 1 where the original's are not 0, an activation by the identity, a normalisation
by a mean. Run forwards from the input this gives what can vary (`taint`); everything else is a
constant, whose value the traced pass has shown. Its gradient gives what the output needs (`need`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sclcore.export.removal.operations import MULTIPLY, Kind, argument, kind_of
from sclcore.export.removal.program import Program, Step, substitute

_SAME = {"clone", "contiguous", "alias", "detach", "lift_fresh_copy"}
_PADDING = {"constant_pad_nd": 2, "pad": 3}  # where the value to pad with stands


class Dependence:
    """The dependencies of a traced network; weights that are exactly 0 carry none."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kinds = {step.name: kind_of(step, program) for step in program.steps}
        self._patterns: dict[str, Tensor] = {}
        self._taint: dict[str, Any] = {}
        self.edges = True  # whether constants that depend on the image's size count as varying
        self._cut: Mapping[str, Tensor] = {}
        self._reach: dict[str, Any] = {}
        with torch.no_grad():
            self._forward(first=True)
            self.edges = False
            self._forward(first=False)
            self.edges = True
        self._at_this_size = {n: _map(lambda r: r > 0, r) for n, r in self._reach.items()}

    def taint(self, ref: Any) -> Tensor:
        """bool, of the tensor's shape: true where its elements may vary with the input."""
        return self._taint[ref.name]

    def taint_at_this_size(self, ref: Any) -> Tensor:
        """As `taint`, for images of the example's size only, whose edges are always the same."""
        return self._at_this_size[ref.name]

    def need(self, cut: Mapping[str, Tensor]) -> dict[str, Any]:
        """Step → bool of its result's shape: true where the network's output depends on it.

        `cut` (step → bool per input feature) says which inputs of linear layers and convolutions
        count as no longer read, because what they add is already part of a bias.
        """
        self._cut = cut
        self._forward(first=False)
        tensors = {
            name: reach
            for name, reach in self._reach.items()
            if isinstance(reach, Tensor) and reach.requires_grad
        }
        ends = [tensors[name] for name in self.program.outputs if name in tensors]
        gradients = torch.autograd.grad(
            ends, list(tensors.values()), [torch.ones_like(t) for t in ends], allow_unused=True
        )
        return {
            name: torch.zeros_like(t, dtype=torch.bool) if g is None else g > 0
            for (name, t), g in zip(tensors.items(), gradients, strict=True)
        }

    def _forward(self, *, first: bool) -> None:
        self._reach = {}
        program = self.program
        for name in (*program.inputs, *program.parameters, *program.constants):
            value = program.values[name]
            if isinstance(value, Tensor):
                fill = torch.ones if name in program.inputs else torch.zeros
                self._reach[name] = fill(value.shape).requires_grad_(not first)
                if first:
                    self._taint[name] = self._reach[name] > 0
        for step in program.steps:
            reach = _map(_Binary.apply, _RULES[self.kinds[step.name]](self, step))
            self._reach[step.name] = reach
            if first:
                self._taint[step.name] = _map(lambda r: r > 0, reach)

    def reach(self, value: Any) -> Any:
        """`value` with the dependencies of the tensors in it, None for what is no tensor."""
        return substitute(value, lambda ref: self._reach.get(ref.name))

    def constant_nonzero(self, ref: Any) -> Tensor:
        return ~self.taint(ref) & (self.program.value(ref) != 0)

    def constant_zero(self, ref: Any) -> Tensor:
        return ~self.taint(ref) & (self.program.value(ref) == 0)

    def pattern(self, step: Step) -> Tensor:
        """1 where an output feature of a layer reads an input feature: [out, in / groups]."""
        name = self.program.parameters[step.args[1].name]
        if name not in self._patterns:
            live = self.program.value(step.args[1]) != 0
            self._patterns[name] = live.flatten(2).any(2) if live.ndim > 2 else live
        pattern = self._patterns[name].float()
        if step.name in self._cut:
            pattern = pattern * ~self._cut[step.name]
        return pattern


class _Binary(torch.autograd.Function):
    """1 where positive, in both directions: counts of paths would overflow in deep networks."""

    @staticmethod
    def forward(ctx: Any, reach: Tensor) -> Tensor:
        return (reach > 0).to(reach.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return (gradients[0] > 0).to(gradients[0].dtype)


def touching_taps(step: Step, kernel: torch.Size) -> Tensor | None:
    """bool of the kernel's shape: which of its weights some input size puts on the padding.

    None where there is no padding. For sizes other than the example's too: what is removed must
    not depend on how large the images are.
    """
    n = len(kernel)
    padding, dilation = _spread(argument(step, 4, 0), n), _spread(argument(step, 5, 1), n)
    touched = torch.zeros(kernel, dtype=torch.bool)
    for dim, (size, pad, spacing) in enumerate(zip(kernel, padding, dilation, strict=True)):
        reach = spacing * (size - 1)
        before, after = (reach // 2, reach - reach // 2) if pad == "same" else (pad, pad)
        taps = torch.arange(size) * spacing
        edge = (taps < before) | (reach - taps < after)
        touched |= edge.view([-1 if d == dim else 1 for d in range(n)])
    return touched if touched.any() else None


def _spread(value: Any, n: int) -> list[Any]:
    if value == "valid":
        value = 0
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * n if len(values) == 1 else values


def _move(d: Dependence, step: Step) -> Any:
    if step.op in _SAME:
        return d.reach(step.args[0])
    if step.op in ("view", "_unsafe_view"):
        return torch.reshape(d.reach(step.args[0]), step.args[1])
    if step.op in _PADDING:
        return _padded(d, step)
    return step.target(*d.reach(step.args), **step.kwargs)


def _padded(d: Dependence, step: Step) -> Tensor:
    """A constant beside padding of another value is constant no longer, at some image size."""
    fill = argument(step, _PADDING[step.op], 0) or 0
    x = step.args[0]
    other = ~d.taint(x) & (d.program.value(x) != fill)
    pad = torch.nn.functional.pad
    return pad(d.reach(x) + other.float() * d.edges, step.args[1])


def _elementwise(d: Dependence, step: Step) -> Tensor:
    refs = list(step.refs())
    total = torch.zeros(())
    for index, ref in enumerate(refs):
        reach = d.reach(ref)
        if step.op in MULTIPLY and len(refs) == 2:
            # Times a constant 0 nothing matters; where both are 0, the first has to stay 0.
            other = refs[1 - index]
            ignored = d.constant_zero(other)
            if index == 0:
                ignored = ignored & ~d.constant_zero(ref)
            reach = reach * ~ignored
        total = total + reach
    return total.expand(d.program.values[step.name].shape)


def _layer(d: Dependence, step: Step) -> Tensor:
    x, pattern = step.args[0], d.pattern(step)
    reach = d.reach(x)
    if step.op == "linear":
        return reach @ pattern.T
    out = _through(reach.flatten(2).mean(2), pattern)
    weight = d.program.value(step.args[1])
    touched = touching_taps(step, weight.shape[2:])
    if touched is not None and d.edges:
        # A constant other than 0 that meets zero padding: another value at the image's edge.
        edge = ((weight != 0) & touched).flatten(2).any(2).float()
        out = out + _through(d.constant_nonzero(x).flatten(2).any(2).float(), edge)
    shape = d.program.values[step.name].shape
    return out.view(*out.shape, *[1] * (len(shape) - 2)).expand(shape)


def _through(channels: Tensor, pattern: Tensor) -> Tensor:
    """[n, channels] through [out, channels / groups] to [n, out]."""
    groups = channels.shape[1] // pattern.shape[1]
    grouped = channels.unflatten(1, (groups, -1))
    return torch.einsum("ngi,goi->ngo", grouped, pattern.unflatten(0, (groups, -1))).flatten(1)


def _batch_norm(d: Dependence, step: Step) -> Any:
    reach, weight = d.reach(step.args[0]), step.args[1]
    if weight is not None:
        live = (d.program.value(weight) != 0).float()
        reach = reach * live.view(1, -1, *[1] * (reach.ndim - 2))
    if step.op != "batch_norm":
        return (reach, *[torch.zeros_like(v) for v in d.program.values[step.name][1:]])
    return reach


def _norm(d: Dependence, step: Step) -> Tensor:
    reach = d.reach(step.args[0])
    if step.op in ("layer_norm", "rms_norm"):
        dims = list(range(-len(step.args[1]), 0))
    else:
        dims = list(range(1, reach.ndim)) if step.op == "group_norm" else [step.args[1]]
    return reach.mean(dims, keepdim=True).expand(reach.shape)


def _reduce(d: Dependence, step: Step) -> Tensor:
    x = step.args[0]
    reach = d.reach(x)
    if step.op == "sum" and d.edges:  # of a constant: as large as there are positions
        reach = reach + d.constant_nonzero(x)
    return step.target(reach, *step.args[1:])


def _pool(d: Dependence, step: Step) -> Tensor:
    x = step.args[0]
    reach = d.reach(x)
    uneven = step.op.startswith("avg_pool") and (argument(step, 3, 0) or argument(step, 6))
    if uneven and d.edges:
        reach = reach + d.constant_nonzero(x)  # zeros at the edge may count
    shape = d.program.values[step.name].shape
    positions = list(range(2, reach.ndim))
    return reach.mean(positions, keepdim=True).expand(shape)


def _attention(d: Dependence, step: Step) -> Tensor:
    query, key, value = step.args[:3]
    # Attention weights sum to 1: a value that is the same at each position comes out as it is.
    numbers = d.program.value(value)
    varies = d.taint(value).any(-2, keepdim=True) | ~uniform(numbers, -2)
    mixing = d.reach(query).mean(-1, keepdim=True) + d.reach(key).mean((-2, -1), keepdim=True)
    reach = d.reach(value).mean(-2, keepdim=True) + varies * mixing
    return reach.expand(d.program.values[step.name].shape)


def uniform(values: Tensor, dim: int) -> Tensor:
    """Whether the values along `dim` are one value (dim kept), up to the order of their sums."""
    first = values.narrow(dim, 0, 1)
    return ((values - first).abs() <= 1e-12 * first.abs()).all(dim, keepdim=True)


def _other(d: Dependence, step: Step) -> Any:
    total = torch.zeros(())
    for ref in step.refs():
        for reach in _tensors(d.reach(ref)):
            total = total + reach.mean()
    return _map(lambda v: total.expand(v.shape), d.program.values[step.name])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _map(function: Any, value: Any) -> Any:
    """`function` of a tensor, or of each tensor of a tuple; None for anything else."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return tuple(_map(function, v) for v in value)
    return None


_RULES = {
    Kind.MOVE: _move,
    Kind.ELEMENTWISE: _elementwise,
    Kind.LAYER: _layer,
    Kind.BATCH_NORM: _batch_norm,
    Kind.NORM: _norm,
    Kind.REDUCE: _reduce,
    Kind.POOL: _pool,
    Kind.ATTENTION: _attention,
    Kind.OTHER: _other,
}
