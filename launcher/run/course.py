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

    `lam` replaces the recipe's λ. `shift` is that of the inputs. `is_main`: this rank prints what
    the user should know.
    """

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        controller: TargetController | None,
        total_steps: int,
        *,
        lam: float | None = None,
        shift: int = 0,
        is_main: bool = True,
    ) -> None:
        self.total_steps, self._shift = total_steps, shift
        self._recipe, self._schedule = recipe, recipe.schedule
        self._scheduler = Scheduler(optimizer, recipe.schedule)
        self._controller = controller
        self._lam = lam
        self._is_main = is_main

    def set(self, progress: Progress) -> None:
        """Set everything for the next update. Collective where λ is steered."""
        share = self._share(progress.step)
        lam = self._lam
        if self._controller is not None:
            steering = progress.steering
            before = Steering(**steering) if steering is not None else self._controller.start
            travel = self._schedule.mask_travel(share)
            # Of a run that was made longer, a smaller share lies behind than when it last acted.
            before = dataclasses.replace(before, travel=min(before.travel, travel))
            now = self._controller.steer(travel, before)
            progress.steering, lam = dataclasses.asdict(now), now.lam
        self._scheduler.set_progress(share, lam=lam)
        if self._controller is not None and self._has_just_frozen(progress.step):
            self._warn_if_missed(self._controller)

    def masks_are_final(self, step: int) -> bool:
        """Whether the network after update `step` has the connections it will end with."""
        place = step - self._shift
        return self._recipe.method.masks_are_final(self._schedule, place, self.total_steps)

    def _share(self, step: int) -> float:
        """How much of the run lies behind, 0 to 1."""
        return (step - self._shift) / self.total_steps

    def _has_just_frozen(self, step: int) -> bool:
        now, before = self._share(step), self._share(step - 1)
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
