"""Why the proxy of the unit step must have a positive derivative: a problem small enough to solve.

Six connections, weights fixed at 1, four samples:

    J(m) = ½ ‖X H(m) − y‖² + λ Σ H(m)

All 64 masks are tried, so the minimum is known. `SCL` itself then trains the mask variables from
m = 1, once with each proxy.

    python docs/figures/proxies.py [--out docs/figures/proxies.png]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.kernels.proxies import PROXIES

STEPS = 240
_LIVE, _DEAD, _WRONG = "#1f6fb4", "#e08a2e", "#c62f2f"
_MINIMUM, _GREY = "#2a9d4a", "#555555"


@dataclass(frozen=True)
class Problem:
    """J(m) = ½ ‖X H(m) − y‖² + λ Σ H(m), one mask variable per column of X."""

    x: Tensor
    y: Tensor
    lam: float

    def objective(self, live: Tensor) -> float:
        """J of a choice of connections (bool, one per column)."""
        choice = live.to(self.x.dtype)
        residual = self.x @ choice - self.y
        return float(0.5 * residual.square().sum() + self.lam * choice.sum())

    def minimum(self) -> tuple[Tensor, float]:
        """The best mask and its J, found by trying all of them."""
        columns = self.x.shape[1]
        masks = [torch.tensor(m) for m in itertools.product([False, True], repeat=columns)]
        best = min(masks, key=self.objective)
        return best, self.objective(best)


def coupled_problem() -> Problem:
    """Columns that overlap: a connection may look superfluous until others have gone.

    Found by trying random small integers, for these: the minimum is unique by a wide margin, and a
    connection that belongs to it is pushed below 0 on the way.
    """
    quarters = [
        [0, -1, -4, -4, 2, -2],
        [-2, 1, -3, 2, 1, 4],
        [4, -2, 2, -3, 0, -3],
        [1, -1, -2, 4, 0, -3],
    ]
    x = torch.tensor(quarters, dtype=torch.float64) / 4
    y = torch.tensor([0.5, 1.5, 1.0, -1.0], dtype=torch.float64)
    return Problem(x, y, lam=0.1)


@dataclass(frozen=True)
class Trajectory:
    """Mask variables before each step and after the last one, and J at each of these moments."""

    masks: Tensor
    objective: list[float]

    @property
    def live(self) -> Tensor:
        """The mask that came out."""
        return self.masks[-1] > 0


def train(
    problem: Problem, proxy: str, *, steps: int = STEPS, start: Tensor | None = None
) -> Trajectory:
    """Train the masks with `SCL`, weights fixed at 1, raw gradients; `start` replaces m = 1."""
    model = nn.Linear(problem.x.shape[1], 1, bias=False, dtype=problem.x.dtype)
    nn.init.ones_(model.weight)
    optimizer = SCL(
        connection_groups(model),
        lr=0.0,
        lam=problem.lam,
        mask_lr=0.02,
        momentum=0.0,
        mask_momentum=0.0,
        normalize="none",
        mask_restart=0.0,
        proxy=proxy,
        min_connections=0,
    )
    if start is not None:
        # State exists after a step: one that moves nothing, then m is set and v follows from it.
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        state = optimizer.state_dict()
        state["state"][0]["mask"] = start.view(1, -1).to(model.weight.dtype)
        optimizer.load_state_dict(state)
    masks = []
    for _ in range(steps + 1):
        variables = optimizer.mask_variables().get("weight", torch.ones_like(model.weight))
        masks.append(variables.detach().flatten().clone())
        optimizer.zero_grad()
        residual = model(problem.x).flatten() - problem.y
        (0.5 * residual.square().sum()).backward()
        optimizer.step()
    history = torch.stack(masks)
    return Trajectory(history, [problem.objective(m > 0) for m in history])


def draw(problem: Problem, path: Path) -> None:
    """Above the mask variables, below the objective; one column per proxy."""
    best, least = problem.minimum()
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(PROXIES), sharex=True, sharey="row", height_ratios=[2.2, 1])
    for column, (name, proxy) in enumerate(PROXIES.items()):
        run = train(problem, name)
        _draw_masks(axes[0, column], run, best)
        condition = "φ′ > 0 everywhere" if proxy.positive else "φ′ = 0 somewhere"
        axes[0, column].set_title(f"{name}\n{condition}", fontsize=11)
        below = axes[1, column]
        below.plot(run.objective, color=_GREY, linewidth=1.6)
        below.axhline(least, color=_MINIMUM, linestyle="--", linewidth=1.4)
        reached = run.objective[-1] - least < 1e-9
        verdict = "at the minimum" if reached else f"stuck {run.objective[-1] - least:.2f} above"
        below.text(0.95, 0.62, verdict, transform=below.transAxes, ha="right", va="top")
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("mask variable m")
    axes[1, 0].set_ylabel("objective J")
    axes[0, -1].text(STEPS / 2, -1.1, "dead: m ≤ 0", color=_GREY, ha="center", va="center")
    handles = [
        Line2D([], [], color=_LIVE, linewidth=2, label="live in the minimum"),
        Line2D([], [], color=_DEAD, linewidth=2, label="dead in the minimum"),
        Line2D([], [], color=_WRONG, marker="X", linestyle="", label="ends on the wrong side"),
        Line2D([], [], color=_MINIMUM, linestyle="--", label="minimum over all 64 masks"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=160)


def _draw_masks(axes: Axes, run: Trajectory, best: Tensor) -> None:
    axes.axhspan(-9, 0, color="#efefef", zorder=0)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    for index in range(len(best)):
        values = run.masks[:, index]
        axes.plot(values, color=_LIVE if best[index] else _DEAD, linewidth=1.8)
        if run.live[index] != best[index]:
            axes.plot(STEPS, values[-1], "X", color=_WRONG, markersize=8, clip_on=False, zorder=5)
    axes.set_ylim(-2.2, 2.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/proxies.png"))
    arguments = parser.parse_args()
    draw(coupled_problem(), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
