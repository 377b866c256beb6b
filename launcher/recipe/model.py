"""The `model:` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

OWN_MODELS = (
    "small_convnet",
    "lenet_300_100",
    "lenet5_caffe",
    "cifar_resnet20",
    "cifar_resnet56",
    "cifar_vgg16_bn",
    "cifar_wrn28_10",
)
"""What timm does not have (`launcher.models` builds them)."""

CUT_FILE = "cut.json"
"""The cut of the network in a folder of a run, beside its recipe."""


class ModelConfig(BaseModel):
    """Which network."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="any timm model, or one of " + ", ".join(OWN_MODELS))
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to the model (drop_path_rate, width …)"
    )
    cut: Path | None = Field(
        default=None,
        description="file that says which features of the model are kept, as `scl shrink` writes "
        "it; null for all",
    )
