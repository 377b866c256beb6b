"""What the theory promises, on problems small enough to solve by trying every mask."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.kernels.proxies import PROXIES

POSITIVE = [name for name, proxy in PROXIES.items() if proxy.positive]
FLAT = [name for name, proxy in PROXIES.items() if not proxy.positive]


def _load_figure() -> ModuleType:
    """docs/figures/proxies.py holds the problems; the figure and these tests are about the same."""
    path = Path(__file__).parents[3] / "docs" / "figures" / "proxies.py"
    spec = importlib.util.spec_from_file_location("figure_proxies", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


figure = _load_figure()


def _separable():
    """Targets t with X = 1, w = 1, λ = 0.3, so J is a sum over connections.

    A live mask variable is pulled by −(t − 1) + λ, a dead one by −t + λ. Both pulls agree, and with
    the minimum (live when t − 1/2 > λ), for t < λ and for t > 1 + λ; the targets keep 0.2 away.
    """
    targets = torch.tensor([2.0, 1.5, 3.0, 1.6, 0.1, -1.0, 0.0, -0.4], dtype=torch.float64)
    return figure.Problem(torch.eye(8, dtype=torch.float64), targets, lam=0.3)


# Half of what should live starts dead, half of what should die starts live, at several distances.
_SCATTERED = torch.tensor([-0.9, 0.5, -0.2, 0.8, 0.4, -0.3, 0.9, -0.6], dtype=torch.float64)


@pytest.mark.parametrize("proxy", POSITIVE)
def test_positive_proxies_find_the_minimum_of_the_coupled_problem(proxy: str) -> None:
    problem = figure.coupled_problem()
    best, least = problem.minimum()
    run = figure.train(problem, proxy)
    assert torch.equal(run.live, best)
    assert run.objective[-1] == least
    # On the way a connection of the minimum had died, and came back.
    revived = best & (run.masks <= 0).any(0)
    assert revived.any()


@pytest.mark.parametrize("proxy", FLAT)
def test_flat_proxies_get_stuck_in_the_coupled_problem(proxy: str) -> None:
    problem = figure.coupled_problem()
    best, least = problem.minimum()
    run = figure.train(problem, proxy, steps=4 * figure.STEPS)
    assert not torch.equal(run.live, best)
    assert run.objective[-1] > least + 0.5
    # Stuck means: never moves again once dead.
    for values in run.masks.T:
        dead = (values <= 0).nonzero().flatten()
        if len(dead):
            assert (values[int(dead[0]) :] == values[int(dead[0])]).all()


@pytest.mark.parametrize("proxy", POSITIVE)
def test_positive_proxies_find_the_minimum_from_any_start(proxy: str) -> None:
    problem = _separable()
    best, least = problem.minimum()
    assert best.tolist() == [t > 0.8 for t in problem.y.tolist()], "the analytic solution"
    # The slowest: leaky_relu's slope 0.1 from −0.9 with pull 2 − λ: 0.9 / (0.02 · 0.1 · 1.7) = 265,
    # and from +0.9 with pull 1 + λ faster; softplus's slope is at least 0.28 there.
    run = figure.train(problem, proxy, steps=600, start=_SCATTERED)
    assert torch.equal(run.live, best)
    assert run.objective[-1] == pytest.approx(least, abs=1e-12)
    # Each mask variable went its way without turning back: the problem is separable.
    direction = torch.where(best, 1.0, -1.0)
    assert (run.masks.diff(dim=0) * direction > 0).all()


@pytest.mark.parametrize("proxy", FLAT)
def test_flat_proxies_never_revive_what_starts_dead(proxy: str) -> None:
    problem = _separable()
    best, _ = problem.minimum()
    run = figure.train(problem, proxy, steps=600, start=_SCATTERED)
    dead_at_start = _SCATTERED <= 0
    assert torch.equal(run.masks[-1][dead_at_start], _SCATTERED[dead_at_start])
    assert torch.equal(run.live, best & ~dead_at_start)
    assert (best & dead_at_start).any(), "some of them belong to the minimum"


def test_between_the_two_pulls_a_mask_flickers() -> None:
    """For λ < t < 1 + λ a live mask is pulled down and a dead one up, for ever."""
    problem = figure.Problem(
        torch.eye(1, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64), lam=0.3
    )
    run = figure.train(problem, "identity", steps=400)
    late = run.masks[200:, 0]
    assert (late > 0).any() and (late <= 0).any()
    assert float(late.abs().max()) <= 0.02 * 0.5  # one step of mask_lr times either pull, 0.5


def test_figure_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "proxies.png"
    figure.draw(figure.coupled_problem(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


class _ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        # ε → 0: with it the output no longer depends on the scale of a filter.
        self.bn = nn.BatchNorm2d(6, eps=1e-14)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.bn(self.conv(x))).mean((2, 3)))


def test_batch_norm_makes_the_task_gradients_of_a_filter_sum_to_zero() -> None:
    """Σ G·v over a filter is 0 (Euler: the loss is homogeneous of degree 0 in the filter).

    So λ alone decides the mean drift of the live mask variables of a feature.
    """
    model = _ConvNorm().double()
    optimizer = SCL(
        connection_groups(model, exclude=["out"]), lr=0.05, lam=0.2, mask_lr=0.02, momentum=0.0
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        x = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(16, 2, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        weight, grad = model.conv.weight.detach(), model.conv.weight.grad
        assert grad is not None
        task = (grad * weight).flatten(1)
        # Sums of 27 terms in float64, each rounded at 1e-16 of it: 1e-12 of their size is ample.
        assert (task.sum(1).abs() <= 1e-12 * (1 + task.abs().sum(1))).all()
        assert (task.abs().sum(1) > 1e-6).any(), "and not because everything is 0"
        optimizer.step()
    live = optimizer.masks()["conv.weight"].flatten(1).sum(1)
    assert (live < 27).all(), "filters with holes were among those checked"
