"""A recipe's model, built for its data."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from launcher.errors import UsageError
from launcher.models.cifar import CifarResNet, CifarVGG, WideResNet
from launcher.models.small import LeNet5Caffe, LeNet300100, SmallConvNet
from launcher.recipe.model import ModelConfig

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_convnet": SmallConvNet,
    "lenet_300_100": LeNet300100,
    "lenet5_caffe": LeNet5Caffe,
    "cifar_resnet20": partial(CifarResNet, depth=20),
    "cifar_resnet56": partial(CifarResNet, depth=56),
    "cifar_vgg16_bn": CifarVGG,
    "cifar_wrn28_10": partial(WideResNet, depth=28, width=10),
}
"""What timm does not have, called with num_classes, in_chans and the recipe's kwargs."""


def create_model(config: ModelConfig, *, num_classes: int, in_chans: int) -> nn.Module:
    """The model of a recipe, for `num_classes` classes and images of `in_chans` channels.

    Raises UsageError when timm knows no such model or the model refuses its kwargs.
    """
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **config.kwargs}
    _check_name(config.name)
    try:
        if config.name in MODELS:
            return MODELS[config.name](**arguments)
        # Here because it takes seconds to import, which none of MODELS should cost.
        import timm

        logging.getLogger("timm").setLevel(logging.WARNING)
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
    if name in MODELS:
        return
    import timm

    if timm.is_model(name.split(".")[0]):
        return
    close = difflib.get_close_matches(name, [*MODELS, *timm.list_models()], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; see timm.list_models()"
    raise UsageError(f"model.name: timm knows no model {name!r}{hint}")
