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
_MISSED = 0.1


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
            before = Steering(**steering) if steering is not None else self._controller.start
            now = self._controller.steer(self._schedule.mask_travel(share), before)
            progress.steering, lam = dataclasses.asdict(now), now.lam
        self._scheduler.set_progress(share, lam=lam)
        if self._controller is not None and self._has_just_frozen(progress.step):
            self._warn_if_missed(self._controller)

    def masks_are_final(self, step: int) -> bool:
        """Whether the network after update `step` has the connections it will end with."""
        return self._recipe.method.masks_are_final(self._schedule, step, self.total_steps)

    def note(self, progress: Progress) -> None:
        """Remember the best epoch, and whether the run has come to a plateau."""
        if not self.masks_are_final(progress.step):
            return
        top1 = max(progress.results["val/top1"], progress.results.get("ema/top1", 0.0))
        if top1 > progress.best_top1 or not progress.best_epoch:
            progress.best_top1, progress.best_epoch = top1, progress.epochs
        patience = self._recipe.optim.early_stop_epochs
        if patience is not None and progress.epochs - progress.best_epoch >= patience:
            progress.stopped_early = progress.epochs < self._recipe.optim.epochs

    def is_over(self, progress: Progress) -> bool:
        """Whether there is no epoch to come."""
        return progress.epochs >= self._recipe.optim.epochs or progress.stopped_early

    def _has_just_frozen(self, step: int) -> bool:
        now, before = (s / self.total_steps for s in (step, step - 1))
        return self._schedule.masks_are_final(now) and not self._schedule.masks_are_final(before)

    def _warn_if_missed(self, controller: TargetController) -> None:
        reached, wanted = controller.reached(), controller.target
        if self._is_main and abs(reached / wanted - 1) > _MISSED:
            _log.warning(
                "target-missed: the masks are final, and %.3g of what is learned is left where "
                "%.3g was asked for. Learn masks for longer (optim.epochs, "
                "schedule.freeze_masks_at), or raise mask_lr.",
                reached,
                wanted,
            )
