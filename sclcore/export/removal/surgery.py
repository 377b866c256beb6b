"""A copy of the network without the features that a proof has named."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sclcore.export.cut import Cut, Kept
from sclcore.export.cutting import Tensors, apply_cut
from sclcore.export.removal.features import Features
from sclcore.export.removal.proof import Verdict


def without(model: nn.Module, features: Features, verdict: Verdict) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose layers lack the removed features.

    Modules stay what they are; only their tensors and the sizes they hold change. Layers that take
    up a constant have a bias afterwards. Types and devices of tensors stay.
    """
    smaller = copy.deepcopy(model).eval()
    tensors = Tensors(smaller)
    for weight, addition in verdict.biases.items():
        tensors.add_to_bias(weight, addition)
    cut = cut_of(features, verdict.removed)
    for weight in verdict.biases:
        if (outputs := cut.kept.get(weight, {}).get(0)) is not None:
            cut.kept[bias_of(weight)] = {0: outputs}
    apply_cut(smaller, cut)
    return smaller


def cut_of(features: Features, removed: Tensor, model: str = "") -> Cut:
    """The cut that removes these groups of features: `removed`, bool per label, of their roots."""
    kept: dict[str, dict[int, Kept]] = {}
    for name, axes in features.axes.items():
        for dim, labels in axes.items():
            stays = ~removed[features.roots(labels)]
            if not stays.all():
                indices = stays.nonzero().flatten().tolist()
                kept.setdefault(name, {})[dim] = Kept(of=len(stays), indices=indices)
    groups: dict[str, int] = {}
    for grouped in features.grouped:
        stays = int((~removed[features.roots(grouped.labels)]).sum())
        module = features.program.model.get_submodule(grouped.layer)
        if isinstance(module, _ConvNd) and stays < module.in_channels:
            groups[grouped.layer] = module.groups * stays // module.in_channels
    heads: dict[str, int] = {}
    for found in features.heads:
        stays = int((~removed[features.roots(found.labels)]).sum())
        if stays < len(found.labels):
            heads[found.module] = stays
    return Cut(model=model, kept=kept, groups=groups, heads=heads)


def bias_of(weight: str) -> str:
    return f"{weight.rpartition('.')[0]}.bias".removeprefix(".")
