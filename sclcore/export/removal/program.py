"""The network as a list of steps with the values of one pass, from torch.export's graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from sclcore.export.files import ExportError

_VIEWS = {
    *("view", "reshape", "permute", "transpose", "select", "slice", "unbind", "split", "chunk"),
    *("expand", "squeeze", "unsqueeze", "flatten", "t", "alias", "detach", "narrow", "getitem"),
    *("split_with_sizes", "unflatten", "contiguous"),
}


class Ref(NamedTuple):
    """The result of the step of this name, as an argument of another."""

    name: str


class Place(NamedTuple):
    """The innermost module that a step belongs to: its name in the model, and its class."""

    name: str
    kind: str


@dataclass(frozen=True)
class Step:
    """One operation: `op` is its name without overload (conv2d, add, getitem …).

    Operations that change their first argument appear as their kin that return a new tensor.
    """

    name: str
    op: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place

    def refs(self) -> Iterator[Ref]:
        yield from find_refs((self.args, tuple(self.kwargs.values())))


@dataclass
class Program:
    """The steps of one evaluation pass in float64, in order, and every value that occurred.

    `inputs` and `outputs` name the network's own; `parameters` maps the steps that stand for
    parameters and buffers to their names in the model (tied ones to the first of their names);
    `constants` are tensors the code made itself.
    """

    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def parameter(self, argument: Any) -> str | None:
        """The model's name of `argument` where it is a parameter or buffer, else None."""
        return self.parameters.get(argument.name) if isinstance(argument, Ref) else None

    def value(self, argument: Any) -> Any:
        return self.values[argument.name] if isinstance(argument, Ref) else argument


def trace(model: nn.Module, example_input: Any) -> Program:
    """Trace `model` in evaluation mode and float64 on `example_input` (a tensor or a tuple).

    The model itself is left as it is. ExportError when it cannot be traced, for instance because
    it decides by the values of a tensor what to compute.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    inputs = tuple(_double(x) for x in as_tuple(example_input))
    try:
        with torch.no_grad():
            exported = torch.export.export(model, inputs, strict=False)
            if _writes_through_views(exported):
                exported = exported.run_decompositions({})
    except Exception as error:
        # torch.export raises a dozen kinds for what Python code may hold; all mean the same here.
        reason = str(error).strip().split("\n")[0]
        raise ExportError(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {reason}): its "
            "forward must not depend on the values of tensors; nothing was changed"
        ) from error
    with torch.no_grad():
        return _program(exported, model, inputs)


def find_refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_refs(item)


def substitute(value: Any, replace: Callable[[Ref], Any]) -> Any:
    """`value` with each Ref in it, at any depth of lists and tuples, replaced."""
    if isinstance(value, Ref):
        return replace(value)
    if isinstance(value, list | tuple):
        return type(value)(substitute(item, replace) for item in value)
    return value


def as_tuple(example_input: Any) -> tuple[Any, ...]:
    return example_input if isinstance(example_input, tuple) else (example_input,)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    return value


def _writes_through_views(exported: ExportedProgram) -> bool:
    """Whether some tensor is changed in place that shares its memory with another in the graph."""
    for node in exported.graph.nodes:
        if node.op != "call_function" or not _op(node).endswith("_"):
            continue
        changed = node.args[0]
        others = [user for user in changed.users if user is not node]
        if _op(changed) in _VIEWS or any(_op(user) in _VIEWS for user in others):
            return True
    return False


def _op(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else str(node.target)


def _program(exported: ExportedProgram, model: nn.Module, inputs: tuple[Any, ...]) -> Program:
    program = Program(model)
    _placeholders(program, exported, inputs)
    current: dict[str, str] = {}  # a tensor changed in place is from then on what changed it
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            program.values[node.name] = getattr(exported.graph_module, str(node.target))
            program.constants.append(node.name)
        elif node.op == "call_function":
            step = _step(node, current)
            changed = node.args[0] if _op(node).endswith("_") else None
            if isinstance(changed, Node):
                before = current.get(changed.name, changed.name)
                current = {k: step.name if v == before else v for k, v in current.items()}
                current[changed.name] = current[before] = step.name
            program.steps.append(step)
            program.values[step.name] = step.target(
                *substitute(step.args, program.value),
                **{k: substitute(v, program.value) for k, v in step.kwargs.items()},
            )
    names = exported.graph_signature.user_outputs
    program.outputs = [current.get(n, n) for n in names if isinstance(n, str)]
    return program


def _placeholders(program: Program, exported: ExportedProgram, inputs: tuple[Any, ...]) -> None:
    signature = exported.graph_signature
    held = _canonical_names(program.model)
    state = dict(_named_tensors(program.model))
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given = iter(inputs)
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in stored:
            program.parameters[node.name] = held[stored[node.name]]
            program.values[node.name] = state[stored[node.name]].detach()
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            program.constants.append(node.name)
            name = signature.inputs_to_lifted_tensor_constants[node.name]
            program.values[node.name] = exported.constants[name]
        else:
            program.inputs.append(node.name)
            program.values[node.name] = next(given)


def _step(node: Node, current: dict[str, str]) -> Step:
    def refer(value: Any) -> Any:
        if isinstance(value, Node):
            return Ref(current.get(value.name, value.name))
        if isinstance(value, list | tuple):
            return type(value)(refer(item) for item in value)
        return value

    op, target = _op(node), node.target
    if op.endswith("_"):
        op = op.removesuffix("_")
        target = getattr(getattr(torch.ops.aten, op), target._overloadname)  # type: ignore[union-attr]
    kwargs = {k: refer(v) for k, v in node.kwargs.items()}
    return Step(node.name, op, target, refer(tuple(node.args)), kwargs, _place(node))  # type: ignore[arg-type]


def _place(node: Node) -> Place:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return Place("", "")
    name, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return Place(name.split("@")[0], kind.rsplit(".", 1)[-1])


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer → the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in _named_tensors(model)}
