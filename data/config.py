"""The `data:` section of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What timm would misread in silence is refused.
_POLICY = re.compile(r"rand(-(m\d+|n\d+|p(0?\.\d+|1|0)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t\w+))*")


class ProgressiveConfig(BaseModel):
    """Small images first, which train faster; evaluation is at image_size throughout."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=1, description="height and width in the first epoch, pixels")
    until: float = Field(
        default=0.8, gt=0, le=1, description="share of the epochs after which images are full size"
    )
    step: int = Field(default=32, ge=1, description="sizes grow by multiples of this, pixels")

    def size_at(self, epoch: int, epochs: int, full: int) -> int:
        """Height and width in `epoch` (from 0) of `epochs`, where image_size is `full`.

        Grows linearly from `start` to `full`, by the nearest whole number of `step`.
        """
        progress = epoch / (self.until * epochs)
        if progress >= 1:
            return full
        steps = (full - self.start) * progress / self.step
        # Python's round would take halves to the even neighbour, once up and once down.
        return min(full, self.start + int(steps + 0.5) * self.step)


class DataConfig(BaseModel):
    """Where the samples are and how they become batches."""

    model_config = ConfigDict(extra="forbid")

    # A URL would lose one of its slashes as a Path.
    path: str | Path = Field(
        description="where train/ and val/ are, as `scl pack` writes them: a folder, a URL "
        "(https, s3, gs: whatever fsspec reads) or `pipe:COMMAND`, in which {} becomes the file's "
        "name"
    )
    image_size: int = Field(ge=1, description="height and width of the images in a batch, pixels")
    augment: Literal["none", "crop", "imagenet"] = Field(
        default="none",
        description="none: as in evaluation; crop: pad with zeros and crop at random (CIFAR); "
        "imagenet: crop of random size and shape",
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.08, 1.0),
        description="share of the image's area that a crop covers, least and most (imagenet)",
    )
    crop_ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="width / height of a crop, least and most (imagenet)"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="how images are resized, in training and evaluation"
    )
    randaugment: str | None = Field(
        default=None,
        description="RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1 (imagenet)",
    )
    random_erasing: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability that a rectangle becomes the set's mean colour (imagenet)",
    )
    hflip: bool = Field(
        default=False, description="mirror half of the training images left to right"
    )
    crop_padding: int = Field(
        default=4, ge=0, description="pixels of zeros around the image (crop)"
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        description="α of mixup: pairs are blended by λ from Beta(α, α); 0: off",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        description="α of CutMix: a box of 1 - λ of the area is swapped; with mixup on as well, "
        "each pair gets one or the other; 0: off",
    )
    progressive: ProgressiveConfig | None = Field(
        default=None, description="train on smaller images first; null: image_size throughout"
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
    cache_dir: Path | None = Field(
        default=None,
        description="where shards from elsewhere are kept, on a disk of this machine; null: "
        "scl/shards in $XDG_CACHE_HOME or ~/.cache",
    )
    cache_gb: float = Field(
        default=200, gt=0, description="most that cache_dir may hold, in GB of 10^9 bytes"
    )
    fetch_ahead: int = Field(
        default=4, ge=1, description="pieces of shards from elsewhere that a rank fetches at a time"
    )
    fetch_timeout_s: float = Field(
        default=30, gt=0, description="a connection silent for so many seconds is given up"
    )
    retries: int = Field(
        default=8, ge=0, description="further tries to fetch a shard before the run ends"
    )
    retry_wait_s: float = Field(
        default=1, ge=0, description="seconds before the second try; doubled with each, to 60"
    )

    @property
    def mixing(self) -> bool:
        """Whether pairs of training samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def training_size(self, epoch: int, epochs: int) -> int:
        """Height and width of the training images of an epoch, pixels."""
        if self.progressive is None:
            return self.image_size
        return self.progressive.size_at(epoch, epochs, self.image_size)

    @property
    def smallest_training_size(self) -> int:
        """Height and width of the smallest images that training will see, pixels."""
        return self.image_size if self.progressive is None else self.progressive.start

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("should be two numbers above 0, the smaller one first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _is_a_share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("a crop covers at most the whole image: should end at 1 or below")
        return value

    @field_validator("randaugment")
    @classmethod
    def _is_understood(cls, value: str | None) -> str | None:
        if value is not None and not _POLICY.fullmatch(value):
            raise ValueError(
                "should be RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ignored = [
            key
            for key in ("crop_scale", "crop_ratio", "randaugment", "random_erasing")
            if self.augment != "imagenet"
            and getattr(self, key) != type(self).model_fields[key].default
        ]
        if ignored:
            raise ValueError(
                f"{ignored[0]} needs augment: imagenet and would do nothing with {self.augment}"
            )
        if self.progressive is not None and self.progressive.start > self.image_size:
            raise ValueError(
                f"progressive.start {self.progressive.start} is above image_size {self.image_size}"
            )
        return self
