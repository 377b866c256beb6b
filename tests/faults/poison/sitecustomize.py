"""Makes one gradient NaN at given updates of a real run; production code knows nothing of it.

Python imports a module of this name at its start when the folder is on PYTHONPATH, whichever
launcher starts the ranks. SCL_FAULTS_NAN="57:1,90:0": update 57 on rank 1, update 90 on rank 0.
Every rank says after such an update whether it changed anything.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_UPDATES = {
    int(update): int(rank)
    for update, rank in (
        pair.split(":") for pair in os.environ.get("SCL_FAULTS_NAN", "").split(",") if pair
    )
}


class _AfterImport(MetaPathFinder):
    """Lets `launcher.run.loop` be imported as ever, and wraps its step then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "launcher.run.loop":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Poisoning(spec.loader)
        return spec


class _Poisoning(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.train_step = _poisoned(module.train_step)  # type: ignore[attr-defined]


def _poisoned(ordinary: Any) -> Any:
    def train_step(learner: Any, course: Any, batches: Any, accumulation: int, *rest: Any) -> Any:
        progress, _ = rest
        update = progress.step + 1
        if update not in _UPDATES:
            return ordinary(learner, course, batches, accumulation, *rest)
        hook, before = None, _state(learner)
        if learner.world.rank == _UPDATES[update]:
            parameter = next(learner.model.parameters())
            hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
        result = ordinary(learner, course, batches, accumulation, *rest)
        if hook is not None:
            hook.remove()
        after = _state(learner)
        same = before.keys() == after.keys() and all(
            before[key].equal(after[key]) for key in before
        )
        said = "changed nothing" if same else "CHANGED the network"
        where = f"rank {learner.world.rank}: NaN at update {update} on rank {_UPDATES[update]}"
        # In one write: the ranks share a file.
        os.write(1, f"{where} {said}\n".encode())
        return result

    return train_step


def _state(learner: Any) -> dict[str, Any]:
    """A copy of every parameter, mask and momentum of this rank."""
    state = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    for number, entry in enumerate(learner.optimizer.state.values()):
        for key, value in entry.items():
            if hasattr(value, "equal"):
                state[f"{number} {key}"] = value.detach().clone()
    return state


if _UPDATES:
    sys.meta_path.insert(0, _AfterImport())
