"""What a recipe says of tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class TrackingConfig(BaseModel, extra="forbid"):
    """What is recorded of a run, and where."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto",
        description=(
            "Where W&B keeps the run. 'auto': WANDB_MODE from the environment if set, else online "
            "if an API key is at hand (WANDB_API_KEY or netrc), else offline, to be synchronised "
            "later. Never asks. metrics.jsonl is written in any case."
        ),
    )
    tensorboard: bool = Field(
        default=False,
        description="Write TensorBoard's event files too, into tensorboard/ of the run's folder. "
        "Needs the package tensorboard.",
    )
    project: str = Field(default="scl", description="W&B project.")
    group: str | None = Field(default=None, description="W&B group: runs to be seen together.")
    tags: list[str] = Field(default=[], description="W&B tags of the run.")
    notes: str | None = Field(default=None, description="A remark that W&B shows with the run.")
    log_every: int = Field(default=10, ge=1, description="Log every so many optimizer steps.")
