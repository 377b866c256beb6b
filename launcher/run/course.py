"""The course of a run: the learning rates and λ of each update."""

from __future__ import annotations

import dataclasses

from torch.optim import Optimizer

from launcher.recipe.recipe import Recipe
from launcher.run.progress import Progress
from sclcore import Scheduler
from sclcore.scl.controller import Steering, TargetController


class Course:
    """Sets the learning rates and λ of each update by the schedule; a target steers λ.

    `shift` is that of the inputs.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        controller: TargetController | None,
        total_steps: int,
        *,
        shift: int = 0,
    ) -> None:
        self.total_steps, self._shift = total_steps, shift
        self._recipe, self._schedule = recipe, recipe.schedule
        self._scheduler = Scheduler(optimizer, recipe.schedule)
        self._controller = controller

    def set(self, progress: Progress) -> bool:
        """Set everything for the next update. Collective where λ is steered.

        Whether the choice that meets a target has been made just now, in the optimizer's tensors.
        """
        share = self._share(progress.step)
        lam, has_chosen = None, False
        if self._controller is not None:
            steering = progress.steering
            before = Steering.of(steering) if steering else Steering()
            now = self._controller.steer(self._schedule.mask_travel(share), before)
            has_chosen = now.is_final and not before.is_final
            progress.steering, lam = dataclasses.asdict(now), now.lam
        self._scheduler.set_progress(share, lam=lam)
        return has_chosen

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
