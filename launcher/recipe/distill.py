"""The `distill:` section of a recipe: a teacher whose outputs are learned besides the labels."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DistillConfig(BaseModel):
    """Learn from the outputs of a trained network as well (Hinton, Vinyals, Dean 2015)."""

    model_config = ConfigDict(extra="forbid")

    teacher: str = Field(
        description="folder of a run, of which the model that it wrote, or else its newest "
        "checkpoint, is taken; or a model of timm's, with the weights that timm publishes"
    )
    weight: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the teacher in the loss; labels have the rest",
    )
    temperature: float = Field(
        default=2.0, gt=0, description="both outputs are divided by it before their softmax"
    )
