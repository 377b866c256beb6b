"""Which tensors of a model are connections, what one of them costs, and how many there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from sclcore.layout.geometry import parse_n_m
from sclcore.network.latency import nanoseconds
from sclcore.network.layers import (
    QUERY_PROJECTIONS,
    Connection,
    derived_weights,
    is_transposed_linear,
    layers_of,
    matches,
    owned_elsewhere,
    refuse_derived,
    undecayed,
)


def find_connections(model: nn.Module, exclude: Sequence[str] = ()) -> list[Connection]:
    """The connections of `model`: weights of Linear, Conv, ConvTranspose and attention projections.

    The Conv1D of Hugging Face's transformers (GPT-2) is a Linear. `exclude` holds shell-style
    patterns over module or parameter names (`"head"`, `"blocks.0.*"`) that stay dense; a pattern
    that matches nothing is a ValueError, since it is a typing error more often than not. Frozen
    parameters and weights tied to something that is no connection (an embedding, say) stay dense
    too. Biases and norm parameters are never connections.
    """
    tied = owned_elsewhere(model)
    matched: set[str] = set()
    found: dict[int, Connection] = {}
    for layer in layers_of(model):
        name, parameter = layer.weight.name, layer.weight.parameter
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run one forward pass first")
        hits = [p for p in exclude if matches(p, layer.module_name) or matches(p, name)]
        matched.update(hits)
        if not hits and parameter.requires_grad and id(parameter) not in tied:
            found.setdefault(id(parameter), layer.weight)
    for derived in derived_weights(model):
        own = (derived.module_name, derived.name)
        matched.update(p for p in exclude if any(matches(p, name) for name in own))
    unmatched = [pattern for pattern in exclude if pattern not in matched]
    if unmatched:
        raise ValueError(
            f"exclude pattern {unmatched[0]!r} matches no layer with connections of this model"
        )
    return list(found.values())


def connection_groups(
    model: nn.Module,
    *,
    exclude: Sequence[str] = (),
    cost: str = "connections",
    example_input: Any = None,
    granularity: str | Mapping[str, str] = "weight",
    n_m: str | Mapping[str, str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for `SCL` or another method: connections first, then whatever stays dense.

    `cost` is what one connection of a layer costs (c_l): `"connections"` is 1 everywhere; `"macs"`
    is the number of times the weight is used in one forward pass of `example_input` (a tensor or a
    tuple of positional arguments, batch size 1; only its shape counts), and `"latency"` how long a
    live weight of the layer takes in the native runtime (sclcore/network/latency.py); both divided
    by the mean over all connections, so that λ keeps its meaning. `options` (lam, mask_lr,
    proxy …) go to the group of connections. Of what stays dense, biases, norm parameters and those
    that the model itself names (`no_weight_decay()`, as timm's) get `weight_decay: 0`, as is the
    custom of the field.

    `granularity` is what lives or dies together: each `weight`, each `kernel` of a convolution (the
    k × k weights between two channels), or all weights of an output `feature`. `n_m`, such as
    `"2:4"`, allows at most N live ones among every M neighbours of the flattened fan-in, from the
    first update on. Either may be a mapping from patterns (as in `exclude`) to values, of which the
    last match counts; layers without a match have the granularity weight and no N:M.

    Raises ValueError when the model has no connections, `cost` is unknown or lacks its input, a
    pattern matches nothing, or a layer that is not excluded computes its weight from other
    parameters (`weight_norm`, `torch.nn.utils.prune`); the optimizer itself when an option is none
    of its own, SCL when a layer cannot have the granularity or N:M it was given.
    """
    refuse_derived(model, exclude)
    connections = find_connections(model, exclude)
    if not connections:
        raise ValueError(
            "the model has no connections to learn: no trainable Linear, Conv, ConvTranspose or "
            "attention projection is left after `exclude`"
        )
    granularities = _for_each(model, connections, "granularity", granularity, "weight")
    patterns = _for_each(model, connections, "n_m", n_m, None)
    learned = {id(c.parameter) for c in connections}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in learned]
    groups: list[dict[str, Any]] = [
        {
            "params": [(c.name, c.parameter) for c in connections],
            "connections": True,
            "transposed_groups": [c.transposed_groups for c in connections],
            "costs": _costs(model, connections, cost, example_input),
            "granularity": granularities,
            "n_m": [parse_n_m(text) if text else None for text in patterns],
            **options,
        }
    ]
    spared = undecayed(model)
    decayed, others = ([(n, p) for n, p in rest if (n in spared) == kind] for kind in (False, True))
    if decayed:
        groups.append({"params": decayed, "connections": False})
    if others:
        groups.append({"params": others, "connections": False, "weight_decay": 0.0})
    return groups


def weight_uses(model: nn.Module, example_input: Any) -> dict[str, float]:
    """How often each weight is used per sample of one forward pass, by parameter name.

    One pass on the meta device: shapes only, no arithmetic, no memory. `example_input` is a tensor
    or a tuple of positional arguments with batch size 1. A weight used by several layers, or by a
    layer called several times, counts each use. The MACs of a layer are uses × live connections.
    """
    uses: dict[str, float] = defaultdict(float)
    handles = []
    for layer in layers_of(model):
        # While the functional call runs, the attribute is a meta stand-in: bind the name.
        hook = _count_uses(uses, layer.weight.name, layer.attribute)
        handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
    try:
        pass_on_meta(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return dict(uses)


def pass_on_meta(model: nn.Module, example_input: Any) -> Any:
    """What `model` returns in evaluation: shapes only; for the hooks that see it computed.

    `example_input` is a tensor or a tuple of positional arguments. The model is left as it was.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # Evaluation, as deployed; PyTorch's fused attention path would go round the hooks.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        # What is tied stays so. Every place once: of a module with two names, torch would take the
        # stand-in for what was there before, and leave it behind.
        stand_ins = {id(tensor): _to_meta(tensor) for _, tensor in _tensors(model)}
        state = {name: stand_ins[id(tensor)] for name, tensor in _tensors(model)}
        # A compiled model would be compiled anew for this one pass.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return torch.func.functional_call(
                model, state, tuple(_to_meta(x) for x in inputs), tie_weights=False
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class LayerBudget:
    """What one layer has and keeps; `macs` are multiply-accumulates per sample."""

    layer: str
    shape: tuple[int, ...]
    connections: int
    live: int
    macs_dense: int
    macs: int

    @property
    def density(self) -> float:
        return self.live / self.connections


def layer_budgets(
    model: nn.Module,
    uses: Mapping[str, float],
    masks: Mapping[str, Tensor] | None = None,
) -> list[LayerBudget]:
    """The budget of each layer with connections, opted-out ones included (they count as dense).

    `uses` comes from `weight_uses`; `masks` (name → bool, true is live) from `SCL.masks()`; without
    masks every connection counts as live.
    """
    masks = masks or {}
    budgets: dict[str, LayerBudget] = {}
    for layer in layers_of(model):
        name, parameter = layer.weight.name, layer.weight.parameter
        total = parameter.numel()
        live = int(masks[name].sum()) if name in masks else total
        used = uses.get(name, 0.0)
        budgets[name] = LayerBudget(
            name,
            tuple(parameter.shape),
            total,
            live,
            macs_dense=round(used * total),
            macs=round(used * live),
        )
    return list(budgets.values())


def _for_each(
    model: nn.Module,
    connections: list[Connection],
    option: str,
    value: str | Mapping[str, str] | None,
    default: str | None,
) -> list[Any]:
    """The value of a per-layer option for each of `connections`."""
    if value is None or isinstance(value, str):
        return [value or default] * len(connections)
    modules = {layer.weight.name: layer.module_name for layer in layers_of(model)}
    found, matched = [], set()
    for connection in connections:
        own = (connection.name, modules[connection.name])
        hits = [p for p in value if any(matches(p, name) for name in own)]
        matched.update(hits)
        found.append(value[hits[-1]] if hits else default)
    unmatched = [pattern for pattern in value if pattern not in matched]
    if unmatched:
        raise ValueError(
            f"{option} pattern {unmatched[0]!r} matches no layer with connections of this model"
        )
    return found


def _costs(
    model: nn.Module, connections: list[Connection], cost: str, example_input: Any
) -> list[float]:
    if cost == "connections":
        return [1.0] * len(connections)
    if cost not in ("macs", "latency"):
        raise ValueError(f"unknown cost {cost!r}: choose connections, macs or latency")
    if example_input is None:
        raise ValueError(
            f'cost "{cost}" needs example_input: the shape of the input decides how often a '
            "connection is used"
        )
    uses = weight_uses(model, example_input)
    counts = [c.parameter.numel() for c in connections]
    used = [uses.get(c.name, 0.0) for c in connections]
    if cost == "latency":
        used = [nanoseconds(u) for u in used]
    mean = sum(n * u for n, u in zip(counts, used, strict=True)) / sum(counts)
    return [u / mean for u in used]


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The tensor of every place in the model; a module with two names has the places of one."""
    for prefix, module in model.named_modules():
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(recurse=False, remove_duplicate=False):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _to_meta(value: Any) -> Any:
    """Shapes without memory; in one precision, so that a model in bfloat16 takes any input."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("meta", torch.float32 if value.is_floating_point() else value.dtype)


def _count_uses(uses: dict[str, float], name: str, attribute: str):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        uses[name] += _positions(module, attribute, args, kwargs, output)
        if isinstance(module, nn.MultiheadAttention) and attribute in QUERY_PROJECTIONS:
            # An attention's out_proj is applied by a function, never called as a module.
            prefix = name.removesuffix(attribute)
            uses[f"{prefix}out_proj.weight"] += _sequence(module, args, kwargs, "query")

    return hook


def _positions(module: nn.Module, attribute: str, args: tuple, kwargs: dict, output: Any) -> float:
    if isinstance(module, nn.MultiheadAttention):
        if attribute == "in_proj_weight":  # a third of its rows each for query, key and value
            return sum(_sequence(module, args, kwargs, s) for s in ("query", "key", "value")) / 3
        source = {"k_proj_weight": "key", "v_proj_weight": "value"}.get(attribute, "query")
        return _sequence(module, args, kwargs, source)
    if isinstance(module, _ConvTransposeNd):
        features, tensor = module.in_channels, args[0] if args else kwargs["input"]
    elif isinstance(module, _ConvNd):
        features, tensor = module.out_channels, output
    elif is_transposed_linear(module):
        features, tensor = module.nf, output
    else:
        features, tensor = module.out_features, output  # type: ignore[union-attr]
    return tensor.numel() / features


def _sequence(module: nn.MultiheadAttention, args: tuple, kwargs: dict, source: str) -> float:
    position = ("query", "key", "value").index(source)
    tensor = args[position] if len(args) > position else kwargs[source]
    return tensor.numel() / tensor.shape[-1]
