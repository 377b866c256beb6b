"""What lies between a Linear layer, an attention and the next: the numbers in another order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from sclcore.export.removal.program import Program, Ref, Step, substitute

ATTENTION = "scaled_dot_product_attention"
_VIEWS = {
    *("view", "reshape", "_unsafe_view", "permute", "transpose", "unbind", "getitem", "flatten"),
    *("unflatten", "contiguous", "clone", "split", "chunk", "dropout"),
}


def attention_views(program: Program) -> set[str]:
    """The names of the views around each attention that nobody but it and its reader sees."""
    operations = {operation.name: operation for operation in program.steps}
    users: dict[str, list[Step]] = defaultdict(list)
    for operation in program.steps:
        for name in {ref.name for ref in operation.refs()}:
            users[name].append(operation)
    found: set[str] = set()
    for operation in program.steps:
        if operation.op == ATTENTION:
            before = set(_before(operations, operation))
            known = {*before, operation.name}
            if all(user.name in known for name in before for user in users[name]):
                found |= before | set(_after(users, operation, program))
    return found


def _before(operations: dict[str, Step], attention: Step) -> Iterator[str]:
    for argument in attention.args[:3]:
        name = argument.name
        while name in operations and operations[name].op in _VIEWS:
            yield name
            name = next(operations[name].refs()).name


def _after(users: dict[str, list[Step]], attention: Step, program: Program) -> Iterator[str]:
    name = attention.name
    while program.values[name].ndim != 3:
        readers = users[name]
        if len(readers) != 1 or readers[0].op not in _VIEWS:
            return
        name = readers[0].name
        yield name


def order_of(program: Program, name: str, root: str) -> Tensor:
    """Which number of `root`, in row-major order, each number of its view `name` is."""
    operations = {operation.name: operation for operation in program.steps}

    def value(ref: Ref) -> object:
        if ref.name == root:
            shape = program.values[root].shape
            return torch.arange(shape.numel()).reshape(shape)
        operation = operations[ref.name]
        return operation.target(*substitute(operation.args, value), **operation.kwargs)

    found = value(Ref(name))
    assert isinstance(found, Tensor)
    return found
