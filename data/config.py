"""The `data:` section of a recipe."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Where the samples are and how they become batches."""

    model_config = ConfigDict(extra="forbid")

    path: Path = Field(description="folder that holds train/ and val/, as `scl pack` writes them")
    image_size: int = Field(ge=1, description="height and width of the images in a batch, pixels")
    augment: Literal["none", "crop", "imagenet"] = Field(
        default="none",
        description="none: as in evaluation; crop: pad with zeros and crop at random (CIFAR); "
        "imagenet: crop of random size and shape",
    )
    hflip: bool = Field(
        default=False, description="mirror half of the training images left to right"
    )
    crop_padding: int = Field(
        default=4, ge=0, description="pixels of zeros around the image (crop)"
    )
    eval_crop_ratio: float = Field(
        default=0.875,
        gt=0,
        le=1,
        description="evaluation scales the shorter side to image_size / ratio and takes the "
        "centre; 1.0: no more than a resize",
    )
    workers: int = Field(
        default=0, ge=0, description="loading processes per rank; 0: in the main process"
    )
    prefetch: int = Field(default=2, ge=1, description="batches each worker keeps ready")
    eval_batch_size: int = Field(
        default=256, ge=1, description="evaluation batch per rank, at most"
    )
    max_corrupt_fraction: float = Field(
        default=0.001, ge=0, le=1, description="share of corrupt samples at which the run ends"
    )
