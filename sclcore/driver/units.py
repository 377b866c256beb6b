"""Which features of a network can be shut, each by a gate of its own, and what dies with them.

A gate multiplies an output feature of a Linear or convolution. It cannot be part of the weight
where batch norm follows directly, which would undo it: there it multiplies γ and β. One pass over
shapes shows what follows what, whatever the code of the network looks like.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, TypedDict

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclcore.network.connections import find_connections, pass_on_meta
from sclcore.network.layers import Layer, layers_of

_SHUT_STAYS_SHUT = {
    *("relu", "gelu", "silu", "tanh", "hardswish", "elu", "leaky_relu", "mish", "softsign", "neg"),
    *("dropout", "native_dropout", "clone", "detach", "alias", "_to_copy", "lift_fresh_copy"),
    *("view", "_unsafe_view", "reshape", "squeeze", "hardtanh", "clamp", "mul", "div", "mean"),
    *("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
}
"""Operations (their names in ATen) that make nothing of a feature that is 0."""
_RANGES = {"hardtanh", "clamp"}
_JOINS = {"add", "sub", "rsub", "where", "maximum", "minimum"}


class Units(TypedDict):
    """What of a tensor of connections can be shut; plain values, since groups are saved."""

    count: int
    """Gates on its output features; 0 where it has none."""
    on_rows: bool
    """Whether a gate multiplies the row of the weight; if not, batch norm's γ and β."""
    vectors: list[str]
    """Parameters [count] that gates multiply as well."""
    columns: list[tuple[str, int]]
    """Tensors whose shut features are not read here, each by so many neighbouring columns."""
    groups: int
    """Groups of the convolution."""


class _Origin(NamedTuple):
    """A layer that a value depends on, with no other in between."""

    layer: str
    dim: int
    block: int
    """Neighbours along `dim` that come from one feature."""
    is_shut: bool
    """Whether the value is 0 where the feature is shut."""


def find_units(
    model: nn.Module, example_input: Any, exclude: list[str], *, joined: bool
) -> dict[str, Units]:
    """The gates of each tensor of connections of `model`, by parameter name.

    `joined`: also on features that are added to those of another layer. Layers whose output is the
    network's, that are used more than once, or whose batch norm has no parameters of its own, have
    none. ValueError in one sentence where no layer is left.
    """
    trail = _Trail()
    hooks = [*_hooked(model, trail)]
    try:
        with trail:
            output = pass_on_meta(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = {o.layer for leaf in tree_leaves(output) for o in trail.origins(leaf)}
    learned = {c.name for c in find_connections(model, exclude)}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    ungated = outputs | (set() if joined else trail.joined)
    places = Counter(layer.weight.name for layer in layers_of(model))
    units: dict[str, Units] = {}
    for layer in layers_of(model):
        name = layer.weight.name
        if name not in learned:
            continue
        units[name] = _no_units(layer)
        if name not in ungated and places[name] == trail.calls[name] == 1:
            _add_gates(units[name], layer, trail, names)
    if not any(each["count"] for each in units.values()):
        hint = "" if joined or not trail.joined else ", or set joined to gate features that are"
        raise ValueError(
            f"{type(model).__name__} has no units to gate: no Linear or convolution is left whose "
            f"features are neither the network's output nor added to those of others{hint}"
        )
    for name, each in units.items():
        each["columns"] = [
            (o.layer, o.block) for o in trail.reads[name] if units.get(o.layer, each)["count"]
        ]
    return units


def _no_units(layer: Layer) -> Units:
    groups = getattr(layer.module, "groups", 1)
    return {"count": 0, "on_rows": True, "vectors": [], "columns": [], "groups": groups}


def _add_gates(units: Units, layer: Layer, trail: _Trail, names: dict[int, str]) -> None:
    module, name = layer.module, layer.weight.name
    if not _has_rows(module):
        return
    norm = trail.norms.get(name)
    owner = module if norm is None else norm
    vectors = [owner.bias] if norm is None else [owner.weight, owner.bias]
    if norm is not None and (trail.readers[name] > 1 or trail.norm_calls[id(norm)] > 1):
        return
    if norm is None and vectors == [None]:
        vectors = []
    if any(id(vector) not in names for vector in vectors):
        return
    units["count"] = layer.weight.parameter.shape[0]
    units["on_rows"] = norm is None
    units["vectors"] = [names[id(vector)] for vector in vectors]


def _has_rows(module: nn.Module) -> bool:
    convolution = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    return convolution or isinstance(module, nn.Linear)


def _hooked(model: nn.Module, trail: _Trail) -> Iterator[Any]:
    for layer in layers_of(model):
        hook = partial(trail.after_layer, layer)
        yield layer.module.register_forward_hook(hook, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            yield module.register_forward_pre_hook(trail.before_norm)
            yield module.register_forward_hook(trail.after_norm)


class _Trail(TorchDispatchMode):
    """Follows the features of each layer through a pass to the layers that read them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, list[_Origin]] = {}
        """Tensor of connections → what it certainly reads from other layers' features."""
        self.calls: Counter[str] = Counter()
        self.norms: dict[str, Any] = {}
        """Tensor of connections → the batch norm that directly follows."""
        self.norm_calls: Counter[int] = Counter()
        self.readers: Counter[str] = Counter()
        self.joined: set[str] = set()
        self._origins: dict[int, list[_Origin]] = {}
        self._untouched: dict[int, str] = {}
        # An id is a tensor's for as long as the tensor lives.
        self._alive: list[Tensor] = []
        self._norm: Any = None

    def origins(self, value: Any) -> list[_Origin]:
        return self._origins.get(id(value), [])

    def _set(self, value: Tensor, origins: list[_Origin]) -> None:
        self._alive.append(value)
        self._origins[id(value)] = origins

    def after_layer(
        self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        name = layer.weight.name
        self.calls[name] += 1
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        is_convolution = isinstance(module, _ConvNd)
        if given is not None and _has_rows(module):
            dim = 1 if is_convolution else given.ndim - 1
            self.reads[name] = [o for o in self.origins(given) if o.is_shut and o.dim == dim]
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                dim = 1 if is_convolution else leaf.ndim - 1
                self._set(leaf, [_Origin(name, dim, 1, True)])
                self._untouched[id(leaf)] = name

    def before_norm(self, module: nn.Module, args: tuple) -> None:
        self.norm_calls[id(module)] += 1
        self._norm = module

    def after_norm(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._norm = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        op = func.overloadpacket.__name__
        name = op.rstrip("_") or op
        untouched = [self._untouched[id(t)] for t in tensors if id(t) in self._untouched]
        self.readers.update(untouched)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._set(leaf, self._carried(name, args, tensors, leaf))
        if op.endswith("_") and args:
            self._untouched.pop(id(args[0]), None)
        return result

    def _carried(self, name: str, args: tuple, tensors: list[Tensor], out: Tensor) -> list[_Origin]:
        """The origins of a result."""
        if "batch_norm" in name and self._norm is not None:
            layer = self._untouched.get(id(args[0]))
            if layer is not None:
                self.norms[layer] = self._norm
                return self.origins(args[0])
        found: dict[str, _Origin] = {}
        for tensor in tensors:
            for origin in self.origins(tensor):
                moved = _moved(name, args, tensor, origin, out)
                before = found.get(origin.layer)
                # Where both factors are shut it does not matter which is.
                if before is None or (moved.is_shut and name == "mul"):
                    found[origin.layer] = moved
                elif before != moved:
                    found[origin.layer] = before._replace(is_shut=before.is_shut and name == "mul")
        sets = [{o.layer for o in self.origins(t)} for t in tensors if self.origins(t)]
        if name in _JOINS and any(each != sets[0] for each in sets):
            self.joined |= found.keys()
        return list(found.values())


def _moved(name: str, args: tuple, tensor: Tensor, origin: _Origin, out: Tensor) -> _Origin:
    """Where the features of `tensor` lie in `out`, and whether they are 0 there when shut."""
    lost = origin._replace(is_shut=False)
    is_first = name in _SHUT_STAYS_SHUT and tensor is args[0]
    if not origin.is_shut or not (is_first or name == "mul"):
        return lost
    if name in _RANGES and not _holds_zero(args):
        return lost
    if name == "mean":
        return _averaged(args, tensor, origin, out)
    if out.ndim == tensor.ndim and out.shape[origin.dim] == tensor.shape[origin.dim]:
        same = out.shape == tensor.shape or "pool" in name or name == "mul"
        return origin if same else lost
    is_flattened = out.ndim == 2 and origin.dim == 1 and out.shape[0] == tensor.shape[0]
    if is_flattened and name in ("view", "_unsafe_view", "reshape", "squeeze"):
        return origin._replace(block=origin.block * math.prod(tensor.shape[2:]))
    return lost


def _holds_zero(args: tuple) -> bool:
    low, high = (*args[1:3], None, None)[:2]
    return (low is None or low <= 0) and (high is None or high >= 0)


def _averaged(args: tuple, tensor: Tensor, origin: _Origin, out: Tensor) -> _Origin:
    dims = {d % tensor.ndim for d in args[1]} if len(args) > 1 and args[1] else set()
    if not dims or origin.dim in dims:
        return origin._replace(is_shut=False)
    if out.ndim == tensor.ndim:
        return origin
    return origin._replace(dim=origin.dim - sum(d < origin.dim for d in dims))
