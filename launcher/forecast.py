"""`scl forecast`: train for a part of the time in which masks are learned, and say what is left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from launcher.cluster.world import find_world
from launcher.engine import apply_update, process_group
from launcher.errors import RunError, UsageError
from launcher.init import read_initial
from launcher.methods import SCLMethod
from launcher.preflight import open_inputs
from launcher.recipe import Recipe
from launcher.session import Session, build_session
from sclcore import SCL, layer_budgets, weight_uses
from sclcore.forecast import Moment, forecast

_AROUND = [2 ** (i / 2) for i in range(-4, 5)]


@dataclass(frozen=True)
class Forecast:
    """Shares of the whole network, excluded layers with it, that λ would leave."""

    lam: float
    density: float
    macs: float


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
    total = inputs.plan(recipe, 1, 0).steps_per_epoch * recipe.optim.epochs
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
        session = build_session(recipe, inputs, world, device, initial)
        for group in session.optimizer.param_groups:
            group["initial_lam"] = lam
        moments = _train(session, steps)
        others = lams or [lam * factor for factor in _AROUND]
        return [_forecast(session, *moments, lam=lam, other=x, reach=reach) for x in others]


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


def _train(session: Session, steps: int) -> tuple[Moment, Moment]:
    """The moments half-way and at the end of `steps` updates."""
    schedule, optimizer = session.recipe.schedule, session.optimizer
    assert isinstance(optimizer, SCL)
    batches = session.batches(0)
    session.engine.train()
    moments = []
    for step in tqdm(range(steps), unit="step", leave=False, disable=not sys.stderr.isatty()):
        session.scheduler.set_progress(step / session.total_steps)
        for micro_step in range(session.plan.accumulation):
            batch = {k: v.to(session.device) for k, v in next(batches).items()}
            session.engine.backward(session.loss(session.forward(batch), batch))
            if micro_step + 1 < session.plan.accumulation:
                session.engine.step()
        apply_update(session.engine)
        if step + 1 in (steps // 2, steps):
            masks = {k: m.detach().float().clone() for k, m in optimizer.mask_variables().items()}
            travel = schedule.mask_travel((step + 1) / session.total_steps)
            moments.append(Moment(travel, masks))
    if optimizer.skipped_steps > steps // 2:
        raise RunError("most gradients were not finite: there is nothing to forecast from")
    earlier, now = moments
    return earlier, now


def _forecast(
    session: Session, earlier: Moment, now: Moment, *, lam: float, other: float, reach: float
) -> Forecast:
    [group] = [g for g in session.optimizer.param_groups if g.get("connections")]
    costs = dict(zip(group["names"], group["costs"], strict=True))
    shares = forecast(earlier, now, lam=lam, other=other, reach=reach, costs=costs)
    size, channels = session.recipe.data.image_size, session.manifest.image.channels
    example: Tensor = torch.empty(1, channels, size, size)
    budgets = layer_budgets(session.model, weight_uses(session.model, example))
    left = [shares.get(b.layer, 1.0) for b in budgets]
    connections, macs = (
        sum(share * getattr(b, key) for share, b in zip(left, budgets, strict=True))
        / sum(getattr(b, key) for b in budgets)
        for key in ("connections", "macs_dense")
    )
    return Forecast(other, connections, macs)
