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

    `shift` is that of the inputs. `is_main`: this rank prints what the user should know.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        controller: TargetController | None,
        total_steps: int,
        *,
        shift: int = 0,
        is_main: bool = True,
    ) -> None:
        self.total_steps, self._shift = total_steps, shift
        self._recipe, self._schedule = recipe, recipe.schedule
        self._scheduler = Scheduler(optimizer, recipe.schedule)
        self._controller = controller
        self._is_main = is_main

    def set(self, progress: Progress) -> None:
        """Set everything for the next update. Collective where λ is steered."""
        share = self._share(progress.step)
        lam = None
        if self._controller is not None:
            steering = progress.steering
            before = Steering.of(steering) if steering else self._controller.start
            travel = self._schedule.mask_travel(share)
            # Of a run that was made longer, a smaller share lies behind than when it last acted.
            before = dataclasses.replace(before, travel=min(before.travel, travel))
            now = self._controller.steer(travel, before)
            if now.is_final and not before.is_final:
                self._warn_if_forced(self._controller)
            progress.steering, lam = dataclasses.asdict(now), now.lam
        self._scheduler.set_progress(share, lam=lam)

    def masks_are_final(self, step: int) -> bool:
        """Whether the network after update `step` has the connections it will end with."""
        place = step - self._shift
        return self._recipe.method.masks_are_final(self._schedule, place, self.total_steps)

    def note(self, progress: Progress) -> None:
        """Remember the best epoch, and whether the run has come to a plateau."""
        if not self.masks_are_final(progress.step):
            return
        top1 = max(progress.results["val/top1"], progress.results.get("ema/top1", 0.0))
        if top1 > progress.best_top1 or not progress.best_epoch:
            progress.best_top1, progress.best_epoch = top1, progress.epochs
        patience = self._recipe.optim.early_stop_epochs
        since = max(progress.best_epoch, progress.patient_from)
        if patience is not None and progress.epochs - since >= patience:
            progress.stopped_early = progress.epochs < self._recipe.optim.epochs

    def is_over(self, progress: Progress) -> bool:
        """Whether there is no epoch to come."""
        return progress.epochs >= self._recipe.optim.epochs or progress.stopped_early

    def _share(self, step: int) -> float:
        """How much of the run lies behind, 0 to 1."""
        return (step - self._shift) / self.total_steps

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
