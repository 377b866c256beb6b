"""The `init:` section of a recipe: the weights and masks that a new run starts from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

RANDOM, PRETRAINED = "random", "timm-pretrained"

UNIFORM, MAGNITUDE = "uniform", "magnitude"


class InitConfig(BaseModel):
    """What a new run starts from; one that continues takes everything from its checkpoint."""

    model_config = ConfigDict(extra="forbid")

    weights: str = Field(
        default=RANDOM,
        description="random; timm-pretrained: timm's published weights of this model; or the path "
        "of a run, a checkpoint, or a .safetensors or .pt file",
    )
    masks: str = Field(
        default=UNIFORM,
        description="uniform: every mask variable is method.mask_init; magnitude: mask_init · |w| "
        "/ mean |w| of the feature, so that small weights are nearer to death; or a path as for "
        "weights, whose zeros start dead",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="seed of random weights where it is not that of the run, which also decides "
        "order and augmentation",
    )
