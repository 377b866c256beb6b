"""A copy of the network without the features that a proof has named."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sclcore.export.removal.features import Features, Heads
from sclcore.export.removal.proof import Verdict


def without(model: nn.Module, features: Features, verdict: Verdict) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose layers lack the removed features.

    Modules stay what they are; only their tensors and the sizes they hold change. Layers that take
    up a constant have a bias afterwards. Types and devices of tensors stay.
    """
    smaller = copy.deepcopy(model).eval()
    tensors = _Tensors(smaller)
    for weight, addition in verdict.biases.items():
        tensors.add_to_bias(weight, addition)
    for name, axes in _with_new_biases(features, verdict).items():
        stays = {dim: ~verdict.removed[features.roots(labels)] for dim, labels in axes.items()}
        tensors.keep(name, {d: s.nonzero().flatten() for d, s in stays.items() if not s.all()})
    for grouped in features.grouped:
        stays = int((~verdict.removed[features.roots(grouped.labels)]).sum())
        module = smaller.get_submodule(grouped.layer)
        if isinstance(module, _ConvNd):
            module.groups = module.groups * stays // module.in_channels
    for heads in features.heads:
        _fewer_heads(smaller, heads, int((~verdict.removed[features.roots(heads.labels)]).sum()))
    for module in smaller.modules():
        _sizes_from_tensors(module)
    return smaller


def _with_new_biases(features: Features, verdict: Verdict) -> dict[str, dict[int, Tensor]]:
    axes = {name: dict(dims) for name, dims in features.axes.items()}
    for weight in verdict.biases:
        axes.setdefault(bias_of(weight), {0: axes[weight][0]})
    return axes


def bias_of(weight: str) -> str:
    return f"{weight.rpartition('.')[0]}.bias".removeprefix(".")


class _Tensors:
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


def _fewer_heads(model: nn.Module, heads: Heads, stays: int) -> None:
    module: Any = model.get_submodule(heads.module)
    module.num_heads = stays
    module.attn_dim = stays * module.head_dim


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
