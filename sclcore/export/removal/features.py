"""Which features belong together: what has to go from several tensors if it goes at all.

Each output feature of a layer gets a number (label), and so does each element of a parameter that
is added or multiplied. The labels are carried through the network beside the values: an operation
that combines two tensors element by element joins their labels; a layer joins those of its input
with those of its weight's columns. Labels that cannot go are frozen, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sclcore.export.removal.groups import NONE, Groups
from sclcore.export.removal.operations import BATCH_NORMS, Kind, kind_of
from sclcore.export.removal.program import Place, Program, Ref, Step, substitute

_CUTS = {
    "slice",
    "select",
    "unbind",
    "split",
    "chunk",
    "split_with_sizes",
    "narrow",
    "roll",
    "flip",
}


@dataclass(frozen=True)
class Reading:
    """A layer that ends the features it reads: `labels` of its input features."""

    step: Step
    labels: Tensor


@dataclass(frozen=True)
class Grouped:
    """A convolution in groups: features pass it in blocks. `labels` of its input features."""

    layer: str
    labels: Tensor


@dataclass(frozen=True)
class Heads:
    """An attention module whose heads can go: one label for each."""

    module: str
    labels: Tensor


class Features(Groups):
    """The labels of a traced network.

    `axes` says what goes with a feature: parameter → dimension → the label of each index.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.axes: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.readings: list[Reading] = []
        self.grouped: list[Grouped] = []
        self.heads: list[Heads] = []
        self._elements: dict[str, Tensor] = {}
        self._labels: dict[str, Any] = {}
        self._walk()

    def _walk(self) -> None:
        program = self.program
        source = self.new(1)
        self.freeze(source, "the network's input")
        for name in program.inputs:
            value = program.values[name]
            if isinstance(value, Tensor):
                self._labels[name] = source.view([1] * value.ndim).expand(value.shape)
        for name in program.constants:
            value = program.values[name]
            if isinstance(value, Tensor):
                self._labels[name] = torch.full((), NONE).expand(value.shape)
        for step in program.steps:
            self._labels[step.name] = _RULES[kind_of(step, program)](self, step)
        for name in program.outputs:
            if isinstance(labels := self._labels[name], Tensor):
                self.freeze(labels, "the network's output")
        self._settle_elements()

    def _settle_elements(self) -> None:
        """Parameters that are added or multiplied: along which of their dimensions features lie."""
        for name, labels in self._elements.items():
            roots = self.roots(labels)
            varying = [d for d in range(roots.ndim) if _varies(roots, d)]
            used = self.axes.get(name, {})
            if len(varying) == 1 and not used:
                self.axes[name][varying[0]] = _line(roots, varying[0])
            elif roots.numel() > 1 or used:
                for labels in (roots, *used.values()):
                    self.freeze(labels, f"the use the code makes of {name}")

    def labels(self, value: Any) -> Any:
        """`value` with the labels of the tensors in it."""
        return substitute(value, self._of)

    def _of(self, ref: Ref) -> Any:
        if ref.name not in self._labels:
            name = self.program.parameters[ref.name]
            if name not in self._elements:
                shape = self.program.values[ref.name].shape
                self._elements[name] = self.new(shape.numel()).view(shape)
            self._labels[ref.name] = self._elements[name]
        return self._labels[ref.name]

    def axis(self, name: str, dim: int, size: int) -> Tensor:
        """The labels of the indices of a parameter's dimension."""
        if dim not in self.axes[name]:
            self.axes[name][dim] = self.new(size)
        return self.axes[name][dim]

    def _frozen_like(self, value: Any, reason: str) -> Any:
        if isinstance(value, Tensor):
            label = self.new(1)
            self.freeze(label, reason)
            return label.view([1] * value.ndim).expand(value.shape) if value.ndim else label[0]
        if isinstance(value, list | tuple):
            return tuple(self._frozen_like(v, reason) for v in value)
        return None


def _varies(labels: Tensor, dim: int) -> bool:
    n = labels.shape[dim]
    if n <= 1 or labels.stride(dim) == 0:
        return False
    return not torch.equal(labels.narrow(dim, 1, n - 1), labels.narrow(dim, 0, n - 1))


def _line(labels: Tensor, dim: int) -> Tensor:
    """The labels along one dimension, at the first index of the others."""
    return labels.movedim(dim, -1).reshape(-1, labels.shape[dim])[0]


def _move(f: Features, step: Step) -> Any:
    labels = f.labels(step.args)
    source = labels[0]
    if step.op in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "getitem"):
        return source[step.args[1]] if step.op == "getitem" else source
    if step.op in ("constant_pad_nd", "pad"):
        return _pad(f, step, source)
    if step.op in ("view", "_unsafe_view"):
        moved = torch.reshape(source, step.args[1])
    else:
        moved = step.target(*labels, **step.kwargs)
    if isinstance(source, Tensor):
        _check_move(f, step, source, moved)
    return moved


def _check_move(f: Features, step: Step, source: Tensor, moved: Any) -> None:
    """Freeze what code with fixed numbers cuts or splits; heads of attention are let through."""
    roots = f.roots(source)
    if _attention_module(f.program.model, step.place) is not None:
        return
    before = [d for d in range(roots.ndim) if _varies(roots, d)]
    if step.op in _CUTS:
        shape = moved.shape if isinstance(moved, Tensor) else moved[0].shape
        if step.op in ("select", "unbind") or len(shape) != roots.ndim:
            dims = [step.args[1] if len(step.args) > 1 else 0]
        else:
            dims = [d for d in range(roots.ndim) if shape[d] != roots.shape[d]]
            dims += [] if step.op not in ("roll", "flip") else list(range(roots.ndim))
        if any(d % roots.ndim in before for d in dims):  # type: ignore[operator]
            f.freeze(roots, f"cut at fixed numbers ({_where(step)})")
    elif isinstance(moved, Tensor):
        after = f.roots(moved)
        if sum(_varies(after, d) for d in range(after.ndim)) > len(before):
            f.freeze(roots, f"split into a fixed shape ({_where(step)})")


def _pad(f: Features, step: Step, source: Tensor) -> Tensor:
    pads: list[int] = list(step.args[1])
    padded = source
    for index in range(len(pads) // 2):
        dim = source.ndim - 1 - index
        before, after = pads[2 * index : 2 * index + 2]
        if not (before or after):
            continue
        roots = f.roots(padded)
        if _varies(roots, dim):
            f.freeze(roots, f"padded to a fixed number ({_where(step)})")
        # Numbers beside a feature belong to it: its own label, its neighbours' where it is cut.
        size = padded.shape[dim] + before + after
        places = (torch.arange(size) - before).clamp(0, padded.shape[dim] - 1)
        padded = padded.index_select(dim, places)
    return padded


def _elementwise(f: Features, step: Step) -> Any:
    shape = f.program.values[step.name].shape
    operands = [f.labels(ref) for ref in step.refs()]
    labelled = [o for o in operands if isinstance(o, Tensor) and bool((o != NONE).any())]
    if not labelled:
        return torch.full((), NONE).expand(shape)
    result = labelled[0]
    for other in labelled[1:]:
        result = _combine(f, step, result, other)
    for constant in operands:
        if not any(constant is o for o in labelled):
            _beside_constant(f, step, result, constant)
    return result.expand(shape)


def _combine(f: Features, step: Step, one: Tensor, other: Tensor) -> Tensor:
    n = max(one.ndim, other.ndim)
    pair = [t.view(*[1] * (n - t.ndim), *t.shape) for t in (one, other)]
    for a, b in (pair, reversed(pair)):
        roots = f.roots(b)
        for dim in range(n):
            if a.shape[dim] == 1 and b.shape[dim] > 1 and _varies(roots, dim):
                # One feature that acts on many: it is not one of them.
                f.freeze(a, f"acts on several features at once ({_where(step)})")
                return b.expand(torch.broadcast_shapes(a.shape, b.shape))
    f.join(*pair)
    return torch.broadcast_tensors(*pair)[0]


def _beside_constant(f: Features, step: Step, labels: Tensor, constant: Tensor) -> None:
    roots = f.roots(labels)
    for back in range(1, min(roots.ndim, constant.ndim) + 1):
        if constant.shape[-back] > 1 and _varies(roots, roots.ndim - back):
            f.freeze(roots, f"combined with numbers the code holds ({_where(step)})")


def _layer(f: Features, step: Step) -> Tensor:
    weight = f.program.parameters[step.args[1].name]
    shape = f.program.value(step.args[1]).shape
    x = f.labels(step.args[0])
    dim = x.ndim - 1 if step.op == "linear" else 1
    inputs = _line(x, dim)
    f.join(x.movedim(dim, -1), inputs)  # all positions of a feature
    outputs = f.axis(weight, 0, shape[0])
    if len(step.args) > 2 and step.args[2] is not None:
        f.join(outputs, f.axis(f.program.parameters[step.args[2].name], 0, shape[0]))
    if len(inputs) == shape[1]:
        columns = f.axis(weight, 1, shape[1])
        f.join(inputs, columns)
        f.readings.append(Reading(step, columns))
    else:
        _blocks(f, weight, inputs, outputs, len(inputs) // shape[1])
    out = f.program.values[step.name].shape
    where = len(out) - 1 if step.op == "linear" else 1
    return outputs.view([-1 if d == where else 1 for d in range(len(out))]).expand(out)


def _blocks(f: Features, weight: str, inputs: Tensor, outputs: Tensor, groups: int) -> None:
    """A convolution can lose whole groups only: its groups are equally large."""
    for block in (inputs.view(groups, -1), outputs.view(groups, -1)):
        f.join(block, outputs.view(groups, -1)[:, :1])
    f.grouped.append(Grouped(weight.rpartition(".")[0], inputs))


def _batch_norm(f: Features, step: Step) -> Any:
    x = f.labels(step.args[0])
    channels = _line(x, 1)
    f.join(x.movedim(1, -1), channels)
    for held in step.args[1:5]:
        if held is None:
            continue
        name = f.program.parameter(held)
        if name is None:
            f.freeze(channels, f"statistics that are no parameters ({_where(step)})")
        else:
            f.join(channels, f.axis(name, 0, len(channels)))
    if step.op in BATCH_NORMS - {"batch_norm"}:
        return (x, None, None)
    return x


def _norm(f: Features, step: Step) -> Tensor:
    x = f.labels(step.args[0])
    roots = f.roots(x)
    if step.op in ("layer_norm", "rms_norm"):
        dims = range(x.ndim - len(step.args[1]), x.ndim)
    else:
        dims = [1] if step.op == "group_norm" else [step.args[1] % x.ndim]
    if any(_varies(roots, d) for d in dims):
        f.freeze(roots, f"{step.op.strip('_')} takes its statistics over it")
    return x


def _reduce(f: Features, step: Step) -> Tensor:
    x = f.labels(step.args[0])
    roots = f.roots(x)
    dims = sorted({d % x.ndim for d in step.args[1]}, reverse=True)
    if any(_varies(roots, d) for d in dims):
        f.freeze(roots, f"{step.op} over the features ({_where(step)})")
        return f._frozen_like(f.program.values[step.name], f"{step.op} over features")
    for dim in dims:
        x = x.narrow(dim, 0, 1)
    return x.reshape(f.program.values[step.name].shape)


def _pool(f: Features, step: Step) -> Any:
    x, value = f.labels(step.args[0]), f.program.values[step.name]
    if not isinstance(value, Tensor):
        return _other(f, step)
    for dim in range(2, x.ndim):
        f.join(x, x.narrow(dim, 0, 1))
        x = x.narrow(dim, 0, 1)
    return x.expand(value.shape)


def _attention(f: Features, step: Step) -> Tensor:
    query, key, value = (f.labels(a) for a in step.args[:3])
    module = _attention_module(f.program.model, step.place)
    if module is None or query.ndim != 4 or not query.shape[1] == key.shape[1] == value.shape[1]:
        for labels in (query, key, value):
            f.freeze(labels, f"attention of {step.place.kind or 'a function'}")
        return f._frozen_like(f.program.values[step.name], "attention")
    heads = query[:, :, :1, :1]
    for labels in (query, key, value):
        f.join(labels, heads)
    f.heads.append(Heads(step.place.name, heads[0, :, 0, 0]))
    return heads.expand(f.program.values[step.name].shape)


def _attention_module(model: nn.Module, place: Place) -> nn.Module | None:
    """The module of `place` if it computes with the numbers of heads it says (timm's Attention)."""
    if not place.name or place.kind not in ("Attention",):
        return None
    module = model.get_submodule(place.name)
    sizes = [getattr(module, name, None) for name in ("num_heads", "head_dim", "attn_dim")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    qkv = getattr(module, "qkv", None)
    fits = isinstance(qkv, nn.Linear) and qkv.out_features == 3 * sizes[0] * sizes[1]  # type: ignore[operator]
    return module if fits else None


def _other(f: Features, step: Step) -> Any:
    reason = f"{step.op} is not understood"
    if not any(step.refs()) and isinstance(value := f.program.values[step.name], Tensor):
        return torch.full((), NONE).expand(value.shape)  # arange, zeros …
    for ref in step.refs():
        for labels in _leaves(f.labels(ref)):
            f.freeze(labels, reason)
    return f._frozen_like(f.program.values[step.name], reason)


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _leaves(v)] if isinstance(value, list | tuple) else []


def _where(step: Step) -> str:
    return f"{step.op} in {step.place.kind}" if step.place.kind else step.op


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
