"""`scl forecast`: train for a part of the time in which masks are learned, and say what is left."""

from __future__ import annotations

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
from sclcore import SCL, layer_budgets, weight_uses
from sclcore.methods.scl import SCLMethod
from sclcore.scl.forecast import Moment, forecast

_AROUND = [2 ** (i / 2) for i in range(-4, 5)]


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
    """Train `recipe` for `share` of the time in which it learns masks; forecast each of `lams`.

    On one rank, in this process; writes nothing. Without `lams`, from a quarter of the recipe's λ
    to four times as much.
    Raises UsageError where there is nothing to forecast, RunError when training fails.
    """
    method, schedule = recipe.method, recipe.schedule
    _check(recipe)
    assert isinstance(method, SCLMethod)
    inputs = open_inputs(recipe, 1)
    total = inputs.total_steps
    steps = round(share * schedule.freeze_masks_at * total)
    if steps < 4 / (1 - method.mask_momentum):
        raise UsageError(
            f"{share:.0%} of the time to learn masks is {steps} updates, too few to see anything: "
            "raise --share, optim.epochs or schedule.freeze_masks_at"
        )
    reach = method.mask_lr / (1 - method.mask_momentum) * schedule.mask_steps(total)
    lam = method.lam if method.lam is not None else method.mask_init / reach
    initial = read_initial(recipe, inputs.manifest)
    world = find_world()
    world.export()
    with process_group(world, recipe.engine) as device:
        learner, course = build(inputs, world, device, initial, lam=lam)
        moments = _train(inputs, learner, course, steps)
        others = lams or [lam * factor for factor in _AROUND]
        return [_forecast(inputs, learner, *moments, lam=lam, other=x, reach=reach) for x in others]


def _check(recipe: Recipe) -> None:
    method = recipe.method
    if find_world().source != "single process":
        raise UsageError("scl forecast runs on one rank: start it by itself, without srun")
    if not isinstance(method, SCLMethod):
        raise UsageError(f"method {method.name} has no λ to forecast for: take a recipe of scl")
    if method.proxy != "identity":
        raise UsageError(f"method.proxy {method.proxy}: a forecast can be made for identity only")
    if method.n_m:
        raise UsageError("method.n_m decides the density itself: there is nothing to forecast")


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


def _train(inputs: Inputs, learner: Learner, course: Course, steps: int) -> tuple[Moment, Moment]:
    """The moments half-way and at the end of `steps` updates."""
    schedule, optimizer = inputs.recipe.schedule, learner.optimizer
    assert isinstance(optimizer, SCL)
    progress, bar = Progress(), _Bar(steps)
    batches = inputs.batches(0, 0)
    learner.engine.train()
    moments = []
    while progress.step < steps:
        train_step(learner, course, batches, inputs.accumulation, progress, bar)
        if progress.step in (steps // 2, steps):
            masks = {k: m.detach().float().clone() for k, m in optimizer.mask_variables().items()}
            moments.append(Moment(schedule.mask_travel(progress.step / inputs.total_steps), masks))
    bar.close()
    if optimizer.skipped_steps > steps // 2:
        raise RunError("most gradients were not finite: there is nothing to forecast from")
    earlier, now = moments
    return earlier, now


def _forecast(
    inputs: Inputs,
    learner: Learner,
    earlier: Moment,
    now: Moment,
    *,
    lam: float,
    other: float,
    reach: float,
) -> Forecast:
    [group] = [g for g in learner.optimizer.param_groups if g.get("connections")]
    costs = dict(zip(group["names"], group["costs"], strict=True))
    shares = forecast(earlier, now, lam=lam, other=other, reach=reach, costs=costs)
    budgets = layer_budgets(learner.model, weight_uses(learner.model, inputs.example))
    left = [shares.get(b.layer, 1.0) for b in budgets]
    connections, macs = (
        sum(share * getattr(b, key) for share, b in zip(left, budgets, strict=True))
        / sum(getattr(b, key) for b in budgets)
        for key in ("connections", "macs_dense")
    )
    return Forecast(other, connections, macs)
