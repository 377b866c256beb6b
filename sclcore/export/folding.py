"""Batch norm with stored statistics as part of the layer before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sclcore.export.removal.operations import Kind, kind_of
from sclcore.export.removal.program import Program, Ref, Step, trace

__all__ = ["fold_batch_norm"]


def fold_batch_norm(
    model: nn.Module, example_input: Any
) -> tuple[nn.Module, list[str], dict[str, str]]:
    """A copy of `model` in evaluation mode in which batch norms are part of the layer before them.

    Returns the copy, the names of the batch norms that were folded and, name → reason, those that
    were not. Outputs in evaluation mode are equal to rounding; weights that are 0 stay 0. A folded
    batch norm becomes an `nn.Identity`, or what its module did besides (timm's BatchNormAct2d: its
    activation). `example_input` is a tensor or a tuple of positional arguments.

    ExportError when the model cannot be traced; the model itself is never changed.
    """
    program = trace(model, example_input)
    steps = {step.name: step for step in program.steps}
    folded_model = copy.deepcopy(model).eval()
    folded: list[str] = []
    left: dict[str, str] = {}
    for step in program.steps:
        # A functional one, without parameters or statistics of a module, has nothing to fold.
        if step.op not in ("batch_norm", "_native_batch_norm_legit_no_training"):
            continue
        name = _norm_of(program, step)
        reason = _obstacle(program, steps, step, name)
        if reason:
            left.setdefault(name or step.name, reason)
        else:
            assert name is not None
            layer = steps[step.args[0].name]
            weight = program.parameters[layer.args[1].name]
            _fold(folded_model, weight.rpartition(".")[0], name)
            folded.append(name)
    return folded_model, folded, left


def _norm_of(program: Program, step: Step) -> str | None:
    """The module that owns the step's parameters or statistics."""
    for held in step.args[1:5]:
        if (name := program.parameter(held)) is not None:
            return name.rpartition(".")[0]
    return None


def _obstacle(program: Program, steps: dict[str, Step], step: Step, name: str | None) -> str:
    """Why this batch norm has to stay, or an empty text."""
    norm = program.model.get_submodule(name) if name is not None else None
    if not isinstance(norm, _BatchNorm) or (type(norm) not in _PLAIN and not _has_activation(norm)):
        return f"its module ({type(norm).__name__}) does something besides that is not known"
    if kind_of(step, program) is not Kind.BATCH_NORM or norm.running_mean is None:
        return "it takes the statistics of the batch, not stored ones"
    layer = steps.get(step.args[0].name) if isinstance(step.args[0], Ref) else None
    if layer is None:
        return "it normalises the network's input"
    if kind_of(layer, program) is not Kind.LAYER:
        return f"what comes before it is no convolution or linear layer but {layer.op}"
    if layer.op == "linear" and program.values[layer.name].ndim != 2:
        return "its channels are not the features of the linear layer before it"
    owner = program.model.get_submodule(program.parameters[layer.args[1].name].rpartition(".")[0])
    if not isinstance(owner, nn.Linear | _ConvNd):
        return f"the layer before it is a {type(owner).__name__}, whose bias is not known"
    readers = sum(ref.name == layer.name for s in program.steps for ref in s.refs())
    if readers != 1 or layer.name in program.outputs:
        return "others read the layer before it too"
    held = {program.parameters[a.name] for a in layer.args[1:3] if isinstance(a, Ref)}
    held |= {program.parameters[a.name] for a in step.args[1:5] if isinstance(a, Ref)}
    uses = [program.parameter(ref) in held for s in program.steps for ref in s.refs()]
    return "it or the layer before it is used several times" if sum(uses) != len(held) else ""


def _has_activation(norm: nn.Module) -> bool:
    """timm's norm and activation in one: after the statistics come `drop` and `act`."""
    children = {name for name, _ in norm.named_children()}
    return type(norm).__name__ == "BatchNormAct2d" and children == {"drop", "act"}


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """y = (Wx + b − μ) γ/√(σ² + ε) + β as one layer; computed in float64."""
    layer: Any = model.get_submodule(layer_name)
    norm: Any = model.get_submodule(norm_name)
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias: Tensor = -norm.running_mean.double()
        if layer.bias is not None:
            bias = bias + layer.bias.double()
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = layer.weight
        shape = [-1] + [1] * (weight.ndim - 1)
        folded = (weight.double() * scale.view(shape)).to(weight.dtype)
    layer.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    remains = _what_remains(norm)
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is norm:  # under each of its names
                module._modules[key] = remains


def _what_remains(norm: nn.Module) -> nn.Module:
    if not _has_activation(norm):
        return nn.Identity()
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act)
