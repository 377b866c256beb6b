"""The `init:` section of a recipe: the weights and masks that a new run starts from."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

RANDOM, PRETRAINED = "random", "timm-pretrained"

AUTO, UNIFORM, MAGNITUDE = "auto", "uniform", "magnitude"


class InitConfig(BaseModel):
    """What a new run starts from; one that continues takes everything from its checkpoint."""

    model_config = ConfigDict(extra="forbid")

    weights: str = Field(
        default=RANDOM,
        description="random; timm-pretrained: timm's published weights of this model; or the path "
        "of a run, a checkpoint, or a .safetensors or .pt file",
    )
    masks: str = Field(
        default=AUTO,
        description="uniform: every mask variable is method.mask_init; magnitude: mask_init · |w| "
        "/ mean |w| of the feature, so that small weights are nearer to death; a path as for "
        "weights, whose zeros start dead; or auto: uniform, but where init.weights is a sparse "
        "network, its zeros start dead",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="seed of random weights where it is not that of the run, which also decides "
        "order and augmentation",
    )

    @model_validator(mode="after")
    def _is_uniform_without_a_network(self) -> Self:
        """Say what will happen: where no sparse network is given, `auto` is always `uniform`."""
        if self.masks == AUTO and self.weights in (RANDOM, PRETRAINED):
            self.masks = UNIFORM
        return self
