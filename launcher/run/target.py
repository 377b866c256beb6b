"""`method.target_density` and `target_macs`: a recipe says what should stay."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from launcher.recipe.recipe import Recipe
from sclcore import SCL, layer_budgets, weight_uses
from sclcore.methods.scl import SCLMethod
from sclcore.scl.controller import TargetController


def controller_of(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, example: Tensor, total_steps: int
) -> TargetController | None:
    """The controller a recipe asks for; None where λ decides. `example` is one input.

    Raises UsageError where the target cannot be met whatever λ does.
    """
    method, schedule = recipe.method, recipe.schedule
    if method.target is None:
        return None
    assert isinstance(method, SCLMethod) and isinstance(optimizer, SCL)
    key, target = method.target
    if schedule.mask_steps(total_steps) < 1:
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
    return TargetController(optimizer, target=share, weights=weights)
