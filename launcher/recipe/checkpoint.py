"""The `checkpoint:` section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, Field


class CheckpointConfig(BaseModel, extra="forbid"):
    """When checkpoints are written, how many stay, and what a start does with those it finds."""

    every_epochs: int = Field(default=1, ge=1, description="Save after every so many epochs.")
    every_steps: int | None = Field(
        default=None, ge=1, description="Save after every so many updates besides; null: never."
    )
    every_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Save when the newest checkpoint is so many minutes old; null: never.",
    )
    keep: int = Field(
        default=2,
        ge=1,
        description="How many of the newest checkpoints stay; the best one stays besides.",
    )
    keep_pareto: int = Field(
        default=3,
        ge=0,
        description="How many checkpoints stay besides because none has both a higher top-1 and "
        "fewer connections.",
    )
    mirror: str | None = Field(
        default=None,
        description="URL that fsspec writes to, such as s3://bucket/run: where all checkpoints are "
        "copied as well, and looked for at a start; null: nowhere",
    )
    resume: str = Field(
        default="auto",
        description=(
            "'auto': continue from the newest sound checkpoint of the run folder, if there is one. "
            "'never': start anew, and refuse to if the run folder holds checkpoints. "
            "Anything else: the path of the checkpoint to continue from."
        ),
    )
