"""Models by name: any of timm's, and one small ConvNet for runs that finish while you watch."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from launcher.errors import UsageError


class ModelConfig(BaseModel):
    """Which network."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="any timm model, or small_convnet")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to the model (drop_path_rate, width …)"
    )


class SmallConvNet(nn.Module):
    """Three 3×3 convolutions with batch norm and one classifier, for images of a few pixels.

    Input [batch, in_chans, height, width], output [batch, num_classes]. `width` is the number of
    features of the first convolution, doubled in the other two. `norm` is `batch`, or `group` for
    statistics that do not depend on how the batch is cut over ranks.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, width: int = 32, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_chans, width, norm),
            *_block(width, 2 * width, norm),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width, norm),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(2 * width * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def create_model(config: ModelConfig, *, num_classes: int, in_chans: int) -> nn.Module:
    """The model of a recipe, for `num_classes` classes and images of `in_chans` channels.

    Raises UsageError when timm knows no such model or the model refuses its kwargs.
    """
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **config.kwargs}
    _check_name(config.name)
    try:
        if config.name == "small_convnet":
            return SmallConvNet(**arguments)
        return timm.create_model(config.name, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"model {config.name} cannot be built with kwargs {config.kwargs}: {error}"
        ) from error


def model_on_meta(
    config: ModelConfig,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    key: str = "data.image_size",
) -> tuple[nn.Module, Tensor]:
    """The model and one image that has passed through it, on the meta device: shapes, no memory.

    `key` is where the recipe says the size. Raises UsageError where that fails, before any process
    is spawned.
    """
    with torch.device("meta"):
        model = create_model(config, num_classes=num_classes, in_chans=in_chans).eval()
        images = torch.empty(1, in_chans, image_size, image_size)
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"model {config.name} does not take images of {in_chans}×{image_size}×{image_size} "
            f"({key}): {error}"
        ) from error
    return model, images


def _check_name(name: str) -> None:
    if name == "small_convnet" or timm.is_model(name.split(".")[0]):
        return
    close = difflib.get_close_matches(name, ["small_convnet", *timm.list_models()], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; see timm.list_models()"
    raise UsageError(f"model.name: timm knows no model {name!r}{hint}")


def _block(inputs: int, outputs: int, norm: str) -> list[nn.Module]:
    norms = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(8, n)}
    if norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, not {norm!r}")
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, norms[norm](outputs), nn.ReLU(inplace=True)]


logging.getLogger("timm").setLevel(logging.WARNING)
