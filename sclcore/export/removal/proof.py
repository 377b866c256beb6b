"""Which groups of features provably change nothing, and what has to be added to biases for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sclcore.export.removal.dependence import Dependence, touching_taps, uniform
from sclcore.export.removal.features import Features, Reading
from sclcore.export.removal.operations import Kind
from sclcore.export.removal.program import Program, Ref, Step

COUPLED = "shares a channel with live features (residual sum, group or head)"
LAST = "the last feature of its layer"
PADDED = "a constant other than 0 that meets zero padding"
VARYING = "a constant that differs between positions"
NO_BIAS = "a constant read by a layer that is used twice or has no bias to take it up"


@dataclass
class Verdict:
    """What goes: `removed`, bool per label, says it of the root of each group.

    `biases` maps a layer's weight to what its bias takes up: [out features], in float64. `left`
    counts per weight the output features that look dead on their own and stay: reason → number.
    """

    removed: Tensor
    biases: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Counter[str]] = field(default_factory=dict)


class _Layer:
    """What a reading layer's input is: per input feature, constants and what they are worth."""

    def __init__(
        self, program: Program, dependence: Dependence, reading: Reading, uses: Counter[str]
    ) -> None:
        step = reading.step
        self.name, self.weight_name = step.name, program.parameters[step.args[1].name]
        self.weight = program.value(step.args[1])
        taps = self.weight.flatten(2) if self.weight.ndim > 2 else self.weight.unsqueeze(2)
        self.reads = taps != 0  # [out, in, taps]
        self.sums = taps.sum(2)
        values, taint = program.value(step.args[0]), dependence.taint(step.args[0])
        feature = values.ndim - 1 if step.op == "linear" else 1
        values = values.movedim(feature, -1).reshape(-1, values.shape[feature])
        taint = taint.movedim(feature, -1).reshape(-1, taint.shape[feature])
        self.constant = ~taint.any(0)
        self.even = uniform(values, 0)[0]
        self.value = values[0]
        touched = None if step.op == "linear" else touching_taps(step, self.weight.shape[2:])
        on_edge = torch.zeros_like(self.reads[..., 0])
        if touched is not None:
            on_edge = (self.reads & touched.flatten()).any(2) & (self.value != 0)
        self.on_edge = on_edge  # [out, in]: a constant reaches the output unevenly
        self.has_bias = _can_take_bias(program, step, uses)

    def judge(self, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """bool per input feature: does not matter; is a constant a bias can hold. And why not."""
        unread = ~self.reads.any(2)[needed].any(0)
        padded = self.on_edge[needed].any(0)
        free = self.has_bias | (self.value == 0)
        absorbed = self.constant & self.even & ~padded & free
        why = torch.full((len(unread),), 0)
        for code, holds in ((3, ~free), (2, ~self.even), (1, padded)):
            why[self.constant & holds] = code
        return unread, absorbed, why


_WHY = (COUPLED, PADDED, VARYING, NO_BIAS)


def prove(program: Program, dependence: Dependence, features: Features) -> Verdict:
    """The largest set of groups each of whose readers ignores it or takes it up as a constant.

    A fixed point: what only removed features read is itself removed. One feature of each tensor
    stays, since no layer can be without.
    """
    uses = Counter(program.parameter(ref) or "" for s in program.steps for ref in s.refs())
    layers = [_Layer(program, dependence, r, uses) for r in features.readings]
    labels = [features.roots(r.labels) for r in features.readings]
    frozen = features.frozen()
    kept: set[int] = set()
    while True:
        removed, why, need = _fixed_point(features, dependence, layers, labels, {*frozen, *kept})
        emptied = _emptied(features, removed)
        if not emptied:
            break
        kept |= emptied
    verdict = Verdict(removed)
    for layer, roots in zip(layers, labels, strict=True):
        taken = layer.constant & layer.even & removed[roots.clamp_min(0)] & (layer.value != 0)
        if taken.any() and layer.has_bias:
            verdict.biases[layer.weight_name] = layer.sums[:, taken] @ layer.value[taken]
    reasons = {**dict.fromkeys(kept, LAST), **frozen}
    verdict.left = _left(program, dependence, features, removed, need, reasons, why)
    return verdict


def _fixed_point(
    features: Features,
    dependence: Dependence,
    layers: list[_Layer],
    labels: list[Tensor],
    staying: set[int],
) -> tuple[Tensor, dict[int, str], dict[str, Tensor]]:
    removed = torch.zeros(features.count(), dtype=torch.bool)
    while True:
        cut = {
            layer.name: removed[roots.clamp_min(0)]
            for layer, roots in zip(layers, labels, strict=True)
        }
        need = dependence.need(cut)
        blocked = torch.zeros(features.count(), dtype=torch.bool)
        blocked[list(staying)] = True
        codes: dict[int, int] = {}
        for layer, roots in zip(layers, labels, strict=True):
            out = need[layer.name]
            dim = 1 if layer.weight.ndim > 2 else out.ndim - 1
            needed = out.movedim(dim, -1).flatten(0, -2).any(0) if out.ndim > 1 else out
            unread, absorbed, why = layer.judge(needed)
            bad = ~(unread | absorbed) & (roots >= 0)
            blocked[roots[bad]] = True
            for root, code in zip(roots[bad].tolist(), why[bad].tolist(), strict=True):
                codes[root] = max(code, codes.get(root, 0))
        found = ~blocked
        if torch.equal(found, removed):
            return removed, {root: _WHY[code] for root, code in codes.items()}, need
        removed = found


def _emptied(features: Features, removed: Tensor) -> set[int]:
    """One group to keep for each parameter's dimension that would lose all."""
    keep: set[int] = set()
    for axes in features.axes.values():
        for labels in axes.values():
            roots = features.roots(labels)
            if removed[roots].all() and not keep.intersection(roots.tolist()):
                keep.add(int(roots[0]))
    return keep


def _can_take_bias(program: Program, step: Step, uses: Counter[str]) -> bool:
    """A Linear or Conv module of its own, used once: a bias given to it is added in one place."""
    names = [name for a in step.args[1:3] if (name := program.parameter(a)) is not None]
    owner = program.model.get_submodule(names[0].rpartition(".")[0])
    plain = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)
    return plain and all(uses[name] == 1 for name in names)


def _left(
    program: Program,
    dependence: Dependence,
    features: Features,
    removed: Tensor,
    need: dict[str, Tensor],
    reasons: dict[int, str],
    why: dict[int, str],
) -> dict[str, Counter[str]]:
    """Output features that are constant or unread on their own, and stay."""
    dead: dict[str, Tensor] = {}
    for step in program.steps:
        if dependence.kinds[step.name] is not Kind.LAYER:
            continue
        name, dim = program.parameters[step.args[1].name], -1 if step.op == "linear" else 1
        result = Ref(step.name)
        constant = ~_per_feature(dependence.taint_at_this_size(result), dim)
        unread = ~_per_feature(need[step.name], dim)
        dead[name] = dead.get(name, torch.tensor(True)) & (constant | unread)
        uneven = constant & _per_feature(dependence.taint(result), dim)
        why.update(dict.fromkeys(features.roots(features.axes[name][0])[uneven].tolist(), PADDED))
    left: dict[str, Counter[str]] = {}
    for name, features_dead in dead.items():
        roots = features.roots(features.axes[name][0])
        stays = roots[features_dead & ~removed[roots]].tolist()
        left[name] = Counter(reasons.get(r) or why.get(r) or COUPLED for r in stays)
    return left


def _per_feature(mask: Tensor, dim: int) -> Tensor:
    mask = mask.movedim(dim, -1)
    return mask.reshape(-1, mask.shape[-1]).any(0)
