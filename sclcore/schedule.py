"""Learning rates, λ and mask freezing as pure functions of progress ∈ [0, 1].

Progress is the share of the run's samples that have been consumed. Since nothing here counts steps,
a resumed run, or one on another number of ranks, sees the same values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Schedule(BaseModel):
    """How the hyper-parameters move over a run; each method takes progress and gives a factor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="shape of the learning rate after its warm-up"
    )
    lr_warmup: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of the run over which lr rises from 0, linearly",
    )
    lr_floor: float = Field(default=0.0, ge=0, le=1, description="cosine ends at this share of lr")
    lr_milestones: list[float] = Field(
        default=[0.3, 0.6, 0.9], description="step: progress at which lr is multiplied by lr_gamma"
    )
    lr_gamma: float = Field(
        default=0.1, gt=0, le=1, description="step: the factor of each milestone"
    )
    lam_warmup: float = Field(
        default=0.0, ge=0, le=1, description="share of the run over which λ rises from 0, linearly"
    )
    mask_lr: Literal["constant", "cosine"] = Field(
        default="constant", description="shape of the mask learning rate until the masks freeze"
    )
    freeze_masks_at: float = Field(
        default=0.5, ge=0, le=1, description="progress from which the masks no longer change"
    )

    @model_validator(mode="after")
    def _milestones_are_progress(self) -> Schedule:
        if any(not 0 <= m <= 1 for m in self.lr_milestones):
            raise ValueError("lr_milestones are shares of the run: each must lie in [0, 1]")
        return self

    def lr_factor(self, progress: float) -> float:
        """Share of the base learning rate."""
        if progress < self.lr_warmup:
            return progress / self.lr_warmup
        if self.lr == "constant":
            return 1.0
        if self.lr == "step":
            return self.lr_gamma ** sum(progress >= m for m in self.lr_milestones)
        after = (progress - self.lr_warmup) / (1 - self.lr_warmup)
        return self.lr_floor + (1 - self.lr_floor) * _half_cosine(after)

    def lam_factor(self, progress: float) -> float:
        """Share of λ."""
        return min(1.0, progress / self.lam_warmup) if self.lam_warmup else 1.0

    def mask_lr_factor(self, progress: float) -> float:
        """Share of the base mask learning rate; 0, which freezes the masks, once they are final."""
        if self.masks_are_final(progress):
            return 0.0
        if self.mask_lr == "cosine":
            return _half_cosine(progress / self.freeze_masks_at)
        return 1.0

    def mask_travel(self, progress: float) -> float:
        """How much of the way that masks can move in the whole run lies behind, 0 to 1."""
        if self.masks_are_final(progress):
            return 1.0
        learned = progress / self.freeze_masks_at
        if self.mask_lr == "cosine":
            return learned + math.sin(math.pi * learned) / math.pi
        return learned

    def mask_steps(self, total_steps: int) -> float:
        """How many updates at the full mask learning rate move masks as far as the whole run."""
        mean = 0.5 if self.mask_lr == "cosine" else 1.0
        return self.freeze_masks_at * total_steps * mean

    def masks_are_final(self, progress: float) -> bool:
        """Whether the masks no longer change from this progress on."""
        return progress >= self.freeze_masks_at


class Scheduler:
    """Applies a `Schedule` to the parameter groups of an optimizer (SCL or any other).

    The base values are those the groups hold when it is made; it notes them in the groups as
    torch's schedulers do (`initial_lr` …), so that they are saved and loaded with the optimizer.
    `set_progress(x)` always gives the same values for the same x, which is all a resume needs.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        for group in optimizer.param_groups:
            for key in ("lr", "lam", "mask_lr"):
                if key in group:
                    group.setdefault(f"initial_{key}", group[key])

    def set_progress(self, progress: float, *, lam: float | None = None) -> None:
        """Set lr, λ and the mask learning rate of every group for `progress` ∈ [0, 1].

        `lam` is the λ that the schedule's factor applies to, where it is steered; None for the
        group's own. Nothing else sets λ. Groups that hold `progress`, as those of
        a `Driver` do, are told it: their masks follow a schedule of their own. An optimizer with
        `lr_progress` says where in the schedule of lr the run is, which may come back there.
        """
        lr_progress = getattr(self.optimizer, "lr_progress", None)
        factors = {
            "lr": self.schedule.lr_factor(lr_progress(progress) if lr_progress else progress),
            "lam": self.schedule.lam_factor(progress),
            "mask_lr": self.schedule.mask_lr_factor(progress),
        }
        for group in self.optimizer.param_groups:
            if "progress" in group:
                group["progress"] = progress
            for key, factor in factors.items():
                if key in group:
                    base = group[f"initial_{key}"] if key != "lam" or lam is None else lam
                    group[key] = base * factor


def _half_cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, x)))
