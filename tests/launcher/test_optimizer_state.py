"""Optimizer state of any shape is in a checkpoint and comes back, or the run says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from launcher.checkpoints import checkpoint
from launcher.checkpoints.convert import to_whole
from launcher.checkpoints.saved_optimizer import SavedOptimizer, layout_of, optimizer_part
from launcher.errors import RunError
from launcher.run.optimizer_state import OptimizerState, parameter_names
from tests.launcher.checkpoints.saving import save


class Gated(SGD):
    """SGD whose rows move by a gate of each, learned from the size of their gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                rows = torch.ones(p.shape[0], 1, dtype=torch.float64)
                state.update(gate=rows, step=0, rule="rows", seen=[torch.zeros(2), 0])
            state["gate"] += p.grad.reshape(p.shape[0], -1).norm(dim=1, keepdim=True)
            state["step"] += 1
            state["seen"][0] += state["step"]
            state["seen"][1] += 1
            p -= (0.1 / state["gate"].float() / state["step"]).view(
                -1, *[1] * (p.ndim - 1)
            ) * p.grad


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _start(make: Callable[[Any], Optimizer]) -> tuple[nn.Module, Optimizer, OptimizerState]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = make(model.parameters())
    engine = SimpleNamespace(optimizer=optimizer)
    names = parameter_names(model, optimizer)
    return model, optimizer, OptimizerState(engine, model, optimizer, names)


def _update(model: nn.Module, optimizer: Optimizer, seed: int, *, spare: int = -1) -> None:
    images = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(images).square().mean().backward()
    for place, parameter in enumerate(model.parameters()):
        if place == spare:
            parameter.grad = None
    optimizer.step()


def _saved(root: Path, state: OptimizerState) -> Path:
    pieces = state.pieces()
    meta = {
        "recipe": {"model": {"name": "m"}},
        "optimizer": {
            "updates": state.updates,
            "pieces": {optimizer_part(0): layout_of(pieces)},
        },
    }
    parts = {optimizer_part(0): pieces, "model": {}}
    return save(root, step=1, parts=parts, meta=meta, keep=1).path


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("whole", [False, True])
def test_state_of_any_shape_resumes_bit_for_bit(whole: bool, tmp_path: Path) -> None:
    def gated(parameters: Any) -> Gated:
        return Gated(parameters, lr=0.1)

    model, optimizer, state = _start(gated)
    for seed in range(3):
        _update(model, optimizer, seed)
    place = _saved(tmp_path / "run", state)
    if whole:
        to_whole(place, tmp_path / "whole")
        place = tmp_path / "whole"
        assert checkpoint.verify(place) == []
    again, other, other_state = _start(gated)
    again.load_state_dict(model.state_dict())
    other_state.load(SavedOptimizer(checkpoint.read(place)))
    for seed in range(3, 6):
        _update(model, optimizer, seed)
        _update(again, other, seed)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        ours, theirs = optimizer.state[one], other.state[two]
        assert torch.equal(ours["gate"], theirs["gate"])
        assert torch.equal(ours["seen"][0], theirs["seen"][0])
        assert [ours[key] for key in ("step", "rule")] == [theirs[key] for key in ("step", "rule")]


@pytest.mark.usefixtures("one_rank")
def test_a_parameter_that_was_spared_keeps_its_own_count(tmp_path: Path) -> None:
    """AdamW corrects its averages by the updates of each parameter."""

    def adamw(parameters: Any) -> AdamW:
        return AdamW(parameters, lr=0.1)

    model, optimizer, state = _start(adamw)
    for seed in range(4):
        _update(model, optimizer, seed, spare=1 if seed < 2 else -1)
    again, other, other_state = _start(adamw)
    again.load_state_dict(model.state_dict())
    other_state.load(SavedOptimizer(checkpoint.read(_saved(tmp_path, state))))
    _update(model, optimizer, 9)
    _update(again, other, 9)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("one_rank")
def test_state_that_cannot_be_saved_is_named() -> None:
    _, optimizer, state = _start(lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["rule"] = object()
    with pytest.raises(RunError, match=r"keeps 'rule' of 0\.weight, of type object, which a check"):
        state.pieces()
    del optimizer.state[first]["rule"]
    optimizer.state["all"]["norm"] = 1.0  # type: ignore[index]
    with pytest.raises(RunError, match="keeps state of 'all', which is none of its parameters"):
        state.pieces()
