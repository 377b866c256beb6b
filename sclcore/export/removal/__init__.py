"""Features that provably do not change the output are removed, and only those."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sclcore.export.files import ExportError
from sclcore.export.removal.dependence import Dependence
from sclcore.export.removal.features import Features
from sclcore.export.removal.operations import Kind, kind_of
from sclcore.export.removal.program import Program, as_tuple, trace
from sclcore.export.removal.proof import Verdict, prove
from sclcore.export.removal.report import LayerChange, RemovalReport
from sclcore.export.removal.surgery import without

__all__ = ["LayerChange", "RemovalReport", "remove_dead_features"]

# Outputs in float64, where sums over 10⁴ terms through 10² layers are exact to about 10⁻¹².
_TOLERANCE = 1e-9


@torch.enable_grad()
def remove_dead_features(model: nn.Module, example_input: Any) -> tuple[nn.Module, RemovalReport]:
    """A smaller copy of `model` with the same outputs in evaluation mode, and what was done.

    Removed are the channels, neurons and attention heads that provably change nothing: those that
    all later layers ignore (weights of exactly 0), and those that are constant whatever the input
    and that all later layers can take up into their bias. `example_input` is a tensor or a tuple of
    positional arguments, batch size 1; the result holds for any size the model takes.

    The copy has the same modules with smaller tensors. ExportError when the model cannot be traced
    or the copy computes something else than the model; the model itself is never changed.
    """
    program = trace(model, example_input)
    features = Features(program)
    dependence = Dependence(program)
    verdict = prove(program, dependence, features)
    # Compared in float64, where nothing but an error in the proof makes more than rounding.
    exact = without(program.model, features, verdict)
    difference, problem = _compare(program.model, exact, example_input)
    smaller = copy.deepcopy(model).eval() if problem else without(model, features, verdict)
    return smaller, _report(model, smaller, program, verdict, difference, problem)


def _compare(model: nn.Module, smaller: nn.Module, example_input: Any) -> tuple[float, str]:
    """The relative difference of outputs on a random input, and why the copy does not run."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_random_like(x, generator) for x in as_tuple(example_input)]
    with torch.no_grad():
        expected = tensors_of(model(*inputs))
        try:
            found = tensors_of(smaller(*inputs))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            return 0.0, f"the code needs the sizes it was built with: {str(error).splitlines()[0]}"
    difference = 0.0
    for one, other in zip(expected, found, strict=True):
        scale = float(one.abs().max()) or 1.0
        difference = max(difference, float((one - other).abs().max()) / scale)
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"without its dead features {type(model).__name__} computes something else (by "
            f"{difference:.1e} of its largest output): an error of ours; nothing was changed"
        )
    return difference, ""


def _random_like(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.cpu()
    return torch.randn(value.shape, generator=generator, dtype=torch.float64)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, dict) else output
    return [t for v in items for t in tensors_of(v)] if isinstance(items, list | tuple) else []


def _report(
    model: nn.Module,
    smaller: nn.Module,
    program: Program,
    verdict: Verdict,
    difference: float,
    problem: str,
) -> RemovalReport:
    uses = _uses(program)
    held = [dict(m.named_parameters(remove_duplicate=False)) for m in (model, smaller)]
    layers = []
    for name, left in verdict.left.items():
        before, after = _features(model, name), _features(smaller, name)
        layers.append(LayerChange(name, before[1], after[1], before[0], after[0], dict(left)))
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    macs = [round(sum(n * p[name].numel() for name, n in uses.items())) for p in held]
    return RemovalReport(
        layers, parameters[0], parameters[1], macs[0], macs[1], difference, problem
    )


def _uses(program: Program) -> dict[str, float]:
    """How often each weight is used in the traced pass; removal leaves that as it is."""
    uses: dict[str, float] = {}
    for step in program.steps:
        if kind_of(step, program) is Kind.LAYER:
            name = program.parameters[step.args[1].name]
            positions = program.values[step.name].numel() / len(program.value(step.args[1]))
            uses[name] = uses.get(name, 0.0) + positions
    return uses


def _features(model: nn.Module, weight: str) -> tuple[int, int]:
    """Output and input features of a layer."""
    owner, _, attribute = weight.rpartition(".")
    module = model.get_submodule(owner)
    outputs, inputs = getattr(module, attribute).shape[:2]
    return outputs, inputs * getattr(module, "groups", 1)
