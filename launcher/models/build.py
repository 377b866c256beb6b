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
from launcher.models.cut import cut_in, make_smaller
from launcher.models.small import LeNet5Caffe, LeNet300100, SmallConvNet
from launcher.recipe.model import ModelConfig
from sclcore.export.cut import Cut

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


def create_model(
    config: ModelConfig, *, num_classes: int, in_chans: int, cut: Cut | None = None
) -> nn.Module:
    """The model of a recipe, for `num_classes` classes and images of `in_chans` channels.

    Only what `cut`, or else the file `config.cut`, keeps of it. Raises UsageError when timm knows
    no such model, the model refuses its kwargs or the cut is of another.
    """
    model = _whole_model(config, num_classes, in_chans)
    if (kept := cut or cut_in(None, config)) is not None:
        make_smaller(model, kept, config)
    return model


def _whole_model(config: ModelConfig, num_classes: int, in_chans: int) -> nn.Module:
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
    size = f"{in_chans}×{image_size}×{image_size}"
    for name, wanted in (("num_classes", num_classes), ("in_chans", in_chans)):
        given = config.kwargs.get(name, wanted)
        if given != wanted:
            what = "classes" if name == "num_classes" else "channels"
            raise UsageError(
                f"model.kwargs.{name} is {given} and the data has {wanted} {what}: leave it out, "
                "it follows from the data"
            )
    with torch.device("meta"):
        model = create_model(config, num_classes=num_classes, in_chans=in_chans).eval()
        images = torch.empty(1, in_chans, image_size, image_size)
    try:
        with torch.no_grad():
            outputs = model(images)
    # A network may refuse in any way: with an error of shapes, or of an attribute it lacks.
    except Exception as error:
        cut = f" as {config.cut} cuts it" if config.cut is not None else ""
        raise UsageError(
            f"model {config.name}{cut} does not take images of {size} ({key}): {_one_line(error)}"
            f"{_size_hint(model, image_size)}"
        ) from error
    _check_outputs(config, outputs, 1, num_classes)
    return model, images


def check_training(
    model: nn.Module, config: ModelConfig, image: Tensor, micro_batch: int, num_classes: int
) -> None:
    """Refuse what fails only in training: one pass of `micro_batch` images on the meta device.

    `model` and `image` are those of `model_on_meta`. Raises UsageError.
    """
    model.train()
    try:
        with torch.no_grad():
            outputs = model(image.expand(micro_batch, *image.shape[1:]))
    except Exception as error:
        # A choice that depends on values, which only a real pass has.
        if "meta" in str(error):
            return
        fix = ""
        if micro_batch == 1:
            fix = "; give each rank 2 at a time: a larger optim.global_batch_size, or fewer ranks"
        raise UsageError(
            f"model {config.name} cannot be trained with micro-batches of {micro_batch} "
            f"({'×'.join(map(str, image.shape[1:]))}): {_one_line(error)}{fix}"
        ) from error
    finally:
        model.eval()
    _check_outputs(config, outputs, micro_batch, num_classes)


def _check_outputs(config: ModelConfig, outputs: object, images: int, num_classes: int) -> None:
    """A score for each class of each image is what training and evaluation understand."""
    if isinstance(outputs, Tensor) and outputs.shape == (images, num_classes):
        return
    what = f"a {type(outputs).__name__}"
    if isinstance(outputs, Tensor):
        what = "outputs of " + "×".join(map(str, outputs.shape[1:]))
    raise UsageError(
        f"model {config.name} with kwargs {config.kwargs} gives {what} for an image, where a score "
        f"for each of the {num_classes} classes is needed: take out of model.kwargs what changes "
        "that, such as features_only or global_pool"
    )


def _size_hint(model: nn.Module, image_size: int) -> str:
    """What to set for a network that is made for images of another size; empty for any other."""
    for module in model.modules():
        made_for = getattr(module, "img_size", None)
        if made_for is None:
            continue
        if tuple(made_for if isinstance(made_for, tuple | list) else [made_for] * 2) != (
            image_size,
            image_size,
        ):
            return f"; it is made for another size: set model.kwargs.img_size={image_size}"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_name(name: str) -> None:
    if name in MODELS:
        return
    import timm

    if timm.is_model(name.split(".")[0]):
        return
    close = difflib.get_close_matches(name, [*MODELS, *timm.list_models()], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; see timm.list_models()"
    raise UsageError(f"model.name: timm knows no model {name!r}{hint}")
