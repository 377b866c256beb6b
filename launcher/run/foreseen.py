"""What can be computed of a run's outcome before its first update."""

from __future__ import annotations

from launcher.recipe.method import SCLMethod
from launcher.recipe.recipe import Recipe

_PLACES = 1000
# Share of the time in which masks learn. A connection without gradient should have died by then.
_SHARE = 0.25


def foreseen(recipe: Recipe, total_steps: int) -> list[str]:
    """What the user should know of a new run of `total_steps` updates; nothing if all is well."""
    method, schedule = recipe.method, recipe.schedule
    if not isinstance(method, SCLMethod) or method.target or not method.lam:
        return []
    learning = schedule.freeze_masks_at * total_steps
    factors = [
        schedule.lam_factor(share) * schedule.mask_lr_factor(share)
        for share in ((place + 0.5) / _PLACES for place in range(_PLACES))
    ]
    steps = sum(factors) / _PLACES * total_steps
    to_die = method.mask_init * (1 - method.mask_momentum) / (method.lam * method.mask_lr)
    if not steps or to_die <= steps:
        return []
    enough = method.mask_lr * to_die / (_SHARE * steps)
    return [
        f"warning: masks-too-slow: a connection without any gradient takes {to_die:,.0f} updates "
        f"to die, and masks learn in {learning:,.0f} of this run's {total_steps:,}: the network "
        f"would stay dense; method.mask_lr={enough:.2g} would do"
    ]
