"""`method.target_density` and `target_macs`: λ is steered, where a recipe says what should stay."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from launcher.methods import SCLMethod
from launcher.recipe import Recipe
from sclcore import SCL, layer_budgets, weight_uses
from sclcore.controller import Steering, TargetController

if TYPE_CHECKING:
    from launcher.session import Session
    from launcher.state import Progress

_log = logging.getLogger("scl")
_MISSED = 0.1


def controller_of(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, example: Tensor, total_steps: int
) -> TargetController | None:
    """The controller a recipe asks for; None where λ is plain. `example` is one input.

    Raises UsageError where the target cannot be met whatever λ does.
    """
    method, schedule = recipe.method, recipe.schedule
    if not isinstance(method, SCLMethod) or not isinstance(optimizer, SCL) or not method.target:
        return None
    key, target = method.target
    steps = schedule.mask_steps(total_steps)
    if steps < 1:
        raise UsageError(
            f"method.{key} needs masks that move: raise schedule.freeze_masks_at above 0"
        )
    uses = weight_uses(model, example)
    budgets = layer_budgets(model, uses)
    weights = {b.layer: uses.get(b.layer, 0.0) if key == "target_macs" else 1.0 for b in budgets}
    sizes = {b.layer: weights[b.layer] * b.connections for b in budgets}
    total = sum(sizes.values())
    learned = sum(sizes[name] for name in optimizer.connection_names)
    share = (target * total - (total - learned)) / learned
    if share <= 0:
        raise UsageError(
            f"method.{key} {target} is less than the layers in method.exclude have already "
            f"({1 - learned / total:.3g}): raise it, or exclude fewer"
        )
    return TargetController(optimizer, target=share, weights=weights, steps=steps, lam=method.lam)


def steer(session: Session, progress: Progress) -> None:
    """Set λ for the update that is next, after the scheduler; says if the target was missed.

    Collective.
    """
    controller = session.controller
    if controller is None:
        return
    schedule, total = session.recipe.schedule, session.total_steps
    share = progress.step / total
    before = controller.start if progress.steering is None else Steering(**progress.steering)
    now = controller.steer(schedule.mask_travel(share), before)
    progress.steering = dataclasses.asdict(now)
    for group in session.optimizer.param_groups:
        if "lam" in group:
            group["lam"] = now.lam * schedule.lam_factor(share)
    final = schedule.masks_are_final(share)
    if final and not schedule.masks_are_final((progress.step - 1) / total):
        _warn_if_missed(session, controller)


def _warn_if_missed(session: Session, controller: TargetController) -> None:
    reached, wanted = controller.reached(), controller.target
    if session.world.is_main and abs(reached / wanted - 1) > _MISSED:
        _log.warning(
            "target-missed: the masks are final, and %.3g of what is learned is left where %.3g "
            "was asked for. Learn masks for longer (optim.epochs, schedule.freeze_masks_at), or "
            "raise mask_lr.",
            reached,
            wanted,
        )
