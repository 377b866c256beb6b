"""`scl forecast`: a short training through all of the mask phase, and what other λ would leave."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from launcher.cluster.world import find_world
from launcher.errors import RunError, UsageError
from launcher.folder.results import percent
from launcher.recipe.recipe import Recipe
from launcher.run.build import build
from launcher.run.course import Course
from launcher.run.engine import process_group
from launcher.run.initial import read_initial
from launcher.run.inputs import Inputs, open_inputs
from launcher.run.learner import Learner
from launcher.run.progress import Progress
from launcher.run.step import train_step
from launcher.terminal import Pace, say
from sclcore import SCL
from sclcore.methods.scl import SCLMethod

_AROUND = [2 ** (i / 2) for i in range(-4, 5)]
_FEWEST = 40


@dataclass(frozen=True)
class Forecast:
    """Shares of the whole network, excluded layers with it, that λ would leave."""

    lam: float
    density: float
    macs: float


def as_table(rows: Sequence[Forecast]) -> list[str]:
    """A forecast for people, line by line."""
    lines = [f"{'λ':>10}  {'density':>9}  {'MACs':>9}"]
    lines += [f"{r.lam:>10.4g}  {percent(r.density):>9}  {percent(r.macs):>9}" for r in rows]
    return lines


def forecast_recipe(
    recipe: Recipe, lams: Sequence[float] | None = None, share: float = 0.25
) -> list[Forecast]:
    """Train `recipe` in `share` of its epochs until masks freeze; forecast each of `lams`.

    The density of each layer is taken to be in proportion to 1 / λ, and 1 at most (docs/lambda.md
    says how far off that is). On one rank, in this process; writes nothing. Without `lams`, from a
    quarter of the recipe's λ to four times as much.
    Raises UsageError where there is nothing to forecast, RunError when training fails.
    """
    _check(recipe)
    short = _shortened(recipe, share)
    inputs = open_inputs(short, 1)
    assert isinstance(short.method, SCLMethod) and short.method.lam
    steps = round(short.schedule.freeze_masks_at * inputs.total_steps)
    if steps < _FEWEST:
        raise UsageError(
            f"masks would be learned in {steps} updates of the short training, too few to see "
            "anything: raise --share, optim.epochs or schedule.freeze_masks_at"
        )
    initial = read_initial(short, inputs.manifest)
    world = find_world()
    world.export()
    with process_group(world, short.engine) as device:
        learner, course = build(inputs, world, device, initial)
        _train(inputs, learner, course, steps)
        lam = short.method.lam
        left = [
            (x, lam / x if x else math.inf) for x in lams or [lam * factor for factor in _AROUND]
        ]
        return [_forecast(learner, lam=x, factor=factor) for x, factor in left]


def _check(recipe: Recipe) -> None:
    method = recipe.method
    if find_world().source != "single process":
        raise UsageError("scl forecast runs on one rank: start it by itself, without srun")
    if not isinstance(method, SCLMethod):
        raise UsageError(f"method {method.name} has no λ to forecast for: take a recipe of scl")
    if method.n_m:
        raise UsageError("method.n_m decides the density itself: there is nothing to forecast")
    if method.target or not method.lam:
        raise UsageError(
            "scl forecast says what a λ leaves, and this recipe has none: add --set "
            "method.lam=0.3" + (f" --set method.{method.target[0]}=null" if method.target else "")
        )


def _shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe in `share` of its epochs, with masks that are as much faster."""
    epochs = max(1, round(share * recipe.optim.epochs))
    method = recipe.method
    assert isinstance(method, SCLMethod)
    if method.mask_lr != "auto":
        rate = method.mask_lr * recipe.optim.epochs / epochs
        method = method.model_copy(update={"mask_lr": rate})
    optim = recipe.optim.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update={"optim": optim, "method": method})


class _Bar:
    """The watcher of a training that leaves nothing: a progress bar."""

    def __init__(self, steps: int) -> None:
        self._bar = tqdm(total=steps, unit="step", leave=False, disable=not sys.stderr.isatty())
        self._steps, self._pace = steps, Pace()

    def before_step(self, step: int) -> None:
        pass

    def after_micro_batch(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> None:
        pass

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None:
        self._bar.update()
        if self._bar.disable and self._pace.is_due():
            seconds = self._pace.seconds
            say(f"forecast: update {step:,} of {self._steps:,}, {seconds:.0f} s so far")

    def close(self) -> None:
        self._bar.close()


def _train(inputs: Inputs, learner: Learner, course: Course, steps: int) -> None:
    optimizer, progress, bar = learner.optimizer, Progress(), _Bar(steps)
    assert isinstance(optimizer, SCL)
    batches = inputs.batches(0, 0)
    learner.engine.train()
    while progress.step < steps:
        train_step(learner, course, batches, inputs.accumulation, progress, bar)
    bar.close()
    if optimizer.skipped_steps > steps // 2:
        raise RunError("most gradients were not finite: there is nothing to forecast from")


def _forecast(learner: Learner, *, lam: float, factor: float) -> Forecast:
    optimizer = learner.optimizer
    assert isinstance(optimizer, SCL)
    live = optimizer.live_connections()
    budgets = learner.budgets
    left = [
        min(1.0, factor * live[b.layer] / b.connections) if b.layer in live else 1.0
        for b in budgets
    ]
    connections, macs = (
        sum(share * getattr(b, key) for share, b in zip(left, budgets, strict=True))
        / sum(getattr(b, key) for b in budgets)
        for key in ("connections", "macs_dense")
    )
    return Forecast(lam, connections, macs)
