"""The `method:` section for the methods that SCL is compared with, in the same engine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sclcore.schedule import Schedule


class _Baseline(BaseModel):
    """What the baselines have in common."""

    model_config = ConfigDict(extra="forbid")

    exclude: list[str] = Field(
        default_factory=list, description="patterns of layers that stay dense, such as conv1"
    )

    @property
    def needs_whole_tensors(self) -> bool:
        return True


class MagnitudeMethod(_Baseline):
    """Gradual magnitude pruning, one threshold for all layers (after arXiv 1710.01878)."""

    name: Literal["magnitude"] = Field(description="remove the smallest weights while training")
    density: float = Field(gt=0, le=1, description="share of connections that live in the end")
    begin: float = Field(default=0.0, ge=0, lt=1, description="progress at which pruning begins")
    end: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="progress at which it ends (schedule.freeze_masks_at is for scl)",
    )
    every: int = Field(default=10, ge=1, description="updates between two prunings")

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin must lie below end, which is {self.end}")
        return self

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """The last pruning is part of the first update at `end` or later."""
        return step > 0 and (step - 1) / total_steps >= self.end


class RigLMethod(_Baseline):
    """RigL with the densities of an Erdős–Rényi kernel (arXiv 1911.11134)."""

    name: Literal["rigl"] = Field(description="sparse from the start; drop and grow connections")
    density: float = Field(gt=0, le=1, description="share of connections that live, at all times")
    drop_fraction: float = Field(
        default=0.3, gt=0, le=1, description="share of a layer exchanged at first; falls to 0"
    )
    end: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="progress from which nothing is exchanged (schedule.freeze_masks_at is for "
        "scl)",
    )
    every: int = Field(default=100, ge=1, description="updates between two exchanges")

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return step / total_steps >= self.end


class STRMethod(_Baseline):
    """Soft threshold reparameterisation, one learned threshold per layer (arXiv 2002.03231)."""

    name: Literal["str"] = Field(description="learn below which size weights are 0")
    s_init: float = Field(description="initial s of every layer; the threshold is sigmoid(s)")
    s_weight_decay: float = Field(ge=0, description="L2 decay of s: the larger, the sparser")

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """Thresholds and weights move, and masks with them, until the last update."""
        return step >= total_steps
