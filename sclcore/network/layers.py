"""The layers of a model that hold connections, and those that would if their weights were plain."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

QUERY_PROJECTIONS = ("in_proj_weight", "q_proj_weight")
_ATTENTION_PROJECTIONS = (*QUERY_PROJECTIONS, "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Connection:
    """One weight tensor whose elements are connections.

    `name` is the parameter's name in the model. `transposed_groups` is 0 for tensors whose output
    features lie along dimension 0 (Linear, Conv, attention projections) and the number of groups
    for a ConvTranspose, whose weight has the shape [in, out / groups, *kernel]; 1 for the Conv1D of
    Hugging Face's transformers, a Linear whose weight is [in, out].
    """

    name: str
    parameter: nn.Parameter
    transposed_groups: int = 0


class Layer(NamedTuple):
    module_name: str
    module: nn.Module
    attribute: str
    weight: Connection


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Every place of `model` that holds connections; a shared weight comes once for each."""
    names = {id(p): name for name, p in model.named_parameters()}
    for module_name, module in model.named_modules():
        for attribute, groups in _connection_attributes(module):
            parameter = getattr(module, attribute, None)
            if isinstance(parameter, nn.Parameter):
                weight = Connection(names[id(parameter)], parameter, groups)
                yield Layer(module_name, module, attribute, weight)


def _connection_attributes(module: nn.Module) -> Iterable[tuple[str, int]]:
    """(attribute, transposed groups) of each weight of `module` that holds connections."""
    if isinstance(module, _ConvTransposeNd):
        return [("weight", module.groups)]
    if isinstance(module, _ConvNd | nn.Linear):
        return [("weight", 0)]
    if is_transposed_linear(module):
        return [("weight", 1)]
    if isinstance(module, nn.MultiheadAttention):
        return [(name, 0) for name in _ATTENTION_PROJECTIONS]
    return []


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers, known by its looks: sclcore does without it."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def owned_elsewhere(model: nn.Module) -> set[int]:
    """Parameters that some module other than a layer of connections also holds."""
    held: set[int] = set()
    for module in model.modules():
        ours = {attribute for attribute, _ in _connection_attributes(module)}
        held.update(
            id(p)
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if name not in ours
        )
    return held


class Derived(NamedTuple):
    """A weight of connections that is computed from other parameters; `undo` makes it plain."""

    module_name: str
    name: str
    undo: str | None


def derived_weights(model: nn.Module) -> Iterator[Derived]:
    """Weights that would be connections if they were not computed from trained parameters."""
    for module_name, module in model.named_modules():
        for attribute, _ in _connection_attributes(module):
            if attribute in module._parameters or not _is_trained(module, attribute):
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            yield Derived(module_name, name, _undo(module, attribute))


def refuse_derived(model: nn.Module, exclude: Sequence[str]) -> None:
    """ValueError, in one sentence, where weights stay dense without being in `exclude`."""
    derived = [
        each
        for each in derived_weights(model)
        if not any(matches(p, each.name) or matches(p, each.module_name) for p in exclude)
    ]
    if not derived:
        return
    names = ", ".join(each.name for each in derived[:5])
    more = f" and {len(derived) - 5} more" if len(derived) > 5 else ""
    ways = " or ".join(dict.fromkeys(each.undo for each in derived if each.undo))
    undo = f"make them plain parameters by {ways}, or " if ways else ""
    raise ValueError(
        f"{names}{more} would stay dense, being computed from other parameters in each forward "
        f"pass: {undo}name them in exclude"
    )


def _is_trained(module: nn.Module, attribute: str) -> bool:
    if is_parametrized(module, attribute):
        # Not the attribute itself: asking for it may change state, as spectral_norm's does.
        return any(p.requires_grad for p in module.parametrizations[attribute].parameters())  # type: ignore[union-attr, index]
    sources = [p for n, p in module._parameters.items() if n.startswith(f"{attribute}_")]
    if not sources:
        sources = [module.__dict__.get(attribute)]
    return any(isinstance(source, Tensor) and source.requires_grad for source in sources)


def _undo(module: nn.Module, attribute: str) -> str | None:
    """The call of torch's that makes a weight a plain parameter again, as far as it is known."""
    if is_parametrized(module, attribute):
        return f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{attribute}")'
    if f"{attribute}_g" in module._parameters:
        return "torch.nn.utils.remove_weight_norm(layer)"
    if f"{attribute}_mask" in module._buffers:
        return f'torch.nn.utils.prune.remove(layer, "{attribute}")'
    if f"{attribute}_u" in module._buffers:
        return "torch.nn.utils.remove_spectral_norm(layer)"
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern matches the name of a module or parameter."""
    return fnmatch.fnmatchcase(name, pattern)


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone, as is the custom of the field.

    Vectors, which are biases and parameters of norms, and whatever `model.no_weight_decay()` names,
    as timm's vision transformers do: position embeddings and class tokens.
    """
    named = getattr(model, "no_weight_decay", set)()
    return {name for name, p in model.named_parameters() if p.ndim <= 1 or name in named}
