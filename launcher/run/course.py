"""The course of a run: the learning rates and λ of each update."""

from __future__ import annotations

import dataclasses
import logging

from torch.optim import Optimizer

from launcher.recipe.recipe import Recipe
from launcher.run.progress import Progress
from sclcore import Scheduler
from sclcore.scl.controller import Steering, TargetController

_log = logging.getLogger("scl")
# What the choice at the end cuts or brings back beyond this share costs accuracy.
_FORCED = 0.2


class Course:
    """Sets the learning rates and λ of each update by the schedule; a target steers λ.

    `lam` replaces the recipe's λ. `is_main`: this rank prints what the user should know.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        controller: TargetController | None,
        total_steps: int,
        *,
        lam: float | None = None,
        is_main: bool = True,
    ) -> None:
        self.total_steps = total_steps
        self._recipe, self._schedule = recipe, recipe.schedule
        self._scheduler = Scheduler(optimizer, recipe.schedule)
        self._controller = controller
        self._lam = lam
        self._is_main = is_main

    def set(self, progress: Progress) -> None:
        """Set everything for the next update. Collective where λ is steered."""
        share = progress.step / self.total_steps
        lam = self._lam
        if self._controller is not None:
            steering = progress.steering
            before = Steering.of(steering) if steering else self._controller.start
            now = self._controller.steer(self._schedule.mask_travel(share), before)
            if now.is_final and not before.is_final:
                self._warn_if_forced(self._controller)
            progress.steering, lam = dataclasses.asdict(now), now.lam
        self._scheduler.set_progress(share, lam=lam)

    def masks_are_final(self, step: int) -> bool:
        """Whether the network after update `step` has the connections it will end with."""
        return self._recipe.method.masks_are_final(self._schedule, step, self.total_steps)

    def _warn_if_forced(self, controller: TargetController) -> None:
        learned, wanted = controller.learned, controller.target
        if self._is_main and abs(learned / wanted - 1) > _FORCED:
            _log.warning(
                "target-forced: %.3g of what is learned was left when the masks froze, and exactly "
                "%.3g of it was then kept by force. Learn masks for longer (optim.epochs, "
                "schedule.freeze_masks_at).",
                learned,
                wanted,
            )
