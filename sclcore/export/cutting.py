"""A cut, made: the network loses what it does not keep, and its random weights stay sound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sclcore.export.cut import Cut
from sclcore.export.files import ExportError


def apply_cut(model: nn.Module, cut: Cut) -> None:
    """Take from `model`, in place, what `cut` does not keep; ExportError if it is not its cut."""
    check_cut(cut, model)
    tensors = Tensors(model)
    for name, dims in cut.kept.items():
        tensors.keep(name, {dim: torch.tensor(kept.indices) for dim, kept in dims.items()})
    for layer, groups in cut.groups.items():
        model.get_submodule(layer).groups = groups  # type: ignore[assignment]
    for name, heads in cut.heads.items():
        module: Any = model.get_submodule(name)
        module.num_heads = heads
        module.attn_dim = heads * module.head_dim
    for module in model.modules():
        _sizes_from_tensors(module)


def check_cut(cut: Cut, model: nn.Module) -> None:
    """ExportError, which says the first thing that is wrong, where `cut` is not of `model`."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = dict(model.named_modules())
    for name, dims in cut.kept.items():
        if name not in tensors:
            raise ExportError(f"it keeps features of {name}, which the model does not have")
        shape = tensors[name].shape
        for dim, kept in dims.items():
            if not 0 <= dim < len(shape):
                raise ExportError(f"{name} has {len(shape)} dimensions, and no dimension {dim}")
            if shape[dim] != kept.of:
                raise ExportError(
                    f"dimension {dim} of {name} is {shape[dim]} in the model, {kept.of} in the cut"
                )
    for name in (*cut.groups, *cut.heads):
        if name not in modules:
            raise ExportError(f"it names a module {name}, which the model does not have")


def inputs_of_layers(model: nn.Module) -> dict[str, int]:
    """Layer → how many numbers a feature of it sums over (its fan-in)."""
    return {
        name: module.weight[0].numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd) and len(module.weight)
    }


@torch.no_grad()
def keep_variance(model: nn.Module, inputs_before: Mapping[str, int]) -> None:
    """Scale the random weights of layers that lost inputs by √(inputs before / inputs now).

    A sum over fewer inputs is smaller; scaled, a feature of the cut network has the variance at
    initialisation that it has in the whole one (He et al., arXiv 1502.01852, section 2.2). Where
    the model draws a layer by its fan-in, this is what it would have drawn for the smaller layer.
    """
    for name, now in inputs_of_layers(model).items():
        before = inputs_before[name]
        if now != before:
            module = model.get_submodule(name)
            for tensor in (module.weight, module.bias):
                if isinstance(tensor, Tensor):
                    tensor.mul_((before / now) ** 0.5)


class Tensors:
    """The parameters and buffers of a model by name; a tied one changes at each of its places."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for key, value in held.items():
                    self._places[id(value)].append((held, key))

    def keep(self, name: str, indices: dict[int, Tensor]) -> None:
        """Keep these indices of these dimensions."""
        old = self._get(name)
        new = old.detach()
        for dim, kept in indices.items():
            new = new.index_select(dim, kept.to(old.device))
        if indices:
            self._replace(old, new)

    def add_to_bias(self, weight: str, addition: Tensor) -> None:
        owner = self.model.get_submodule(weight.rpartition(".")[0])
        bias: Any = owner.bias
        like = self._get(weight) if bias is None else bias
        total = addition if bias is None else addition + bias.detach().cpu().double()
        new = total.to(like.dtype).to(like.device)
        if bias is not None:
            self._replace(bias, new)
        else:
            owner.bias = nn.Parameter(new, requires_grad=like.requires_grad)
            self._places[id(owner.bias)] = [(owner._parameters, "bias")]

    def _get(self, name: str) -> Any:
        path, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(path), attribute)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        tensor: Any = new
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(new, requires_grad=old.requires_grad)
        places = self._places.pop(id(old))
        for held, key in places:
            held[key] = tensor
        self._places[id(tensor)] = places


def _sizes_from_tensors(module: nn.Module) -> None:
    """The numbers that a layer says of itself, as its tensors now have them."""
    if isinstance(module, _ConvNd) and not module.transposed:
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        held = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        module.num_features = module.num_features if held is None else len(held)
