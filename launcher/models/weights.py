"""Weights from a run, a checkpoint or a file, and whether they are those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launcher.checkpoints import checkpoint
from launcher.checkpoints.manifest import CheckpointError
from launcher.errors import UsageError
from launcher.folder.needed import check_path

State = dict[str, Tensor]


def read_state(path: str, key: str) -> State:
    """The parameters and buffers that `path` holds, on the CPU; nothing in it is run.

    A run gives the model it wrote, an unfinished one that of its newest checkpoint; a training
    checkpoint of timm's gives its averaged weights, where it has some. `key` is where the recipe
    names the path. Raises UsageError.
    """
    where = Path(path)
    try:
        if where.is_dir():
            return _of_folder(where)
        check_path(where, key)
        # Here because it takes seconds to import, and is only for what others have written.
        from timm.models import load_state_dict

        state = load_state_dict(path, weights_only=True)
    except CheckpointError as error:
        raise UsageError(f"{key}: {error}") from error
    except UsageError:
        raise
    # A foreign file fails in whatever way its content suggests.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{key}: {path} cannot be read as weights: {reason}") from error
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign or not state:
        what = f"holds {foreign[0]!r}, which is no tensor" if foreign else "holds nothing"
        raise UsageError(f"{key}: {path} {what}: give a file with the state_dict of a model")
    return state


def _of_folder(folder: Path) -> State:
    model = folder / "model.safetensors"
    if model.is_file():
        return load_file(model)
    root = folder / "checkpoints"
    return checkpoint.load_part(checkpoint.read(root if root.is_dir() else folder), "model")


def adapted(
    state: Mapping[str, Tensor], model: nn.Module, channels: int, path: str, key: str
) -> tuple[State, list[str]]:
    """`state` for the images and classes of `model`, and what is to be said of it.

    The first convolution is turned to images of `channels` as timm does it: summed for grey ones.
    The classifier is left out where it is missing or for other classes.
    """
    wanted, weights, notes = model.state_dict(), dict(state), []
    for layer in first_convolutions_of(model):
        name = f"{layer}.weight"
        if name not in weights or name not in wanted or weights[name].shape == wanted[name].shape:
            continue
        weight = _for_channels(weights[name], tuple(wanted[name].shape), channels)
        if weight is not None:
            saved_channels = weights[name].shape[1] * channels // wanted[name].shape[1]
            notes.append(
                f"{key}: {layer} is for images of {saved_channels} channels in {path} and "
                f"{channels} here: "
                + ("summed over them" if channels == 1 else "repeated and scaled")
            )
            weights[name] = weight
    classifier = classifier_of(model)
    of_classifier = [name for name in wanted if name.rpartition(".")[0] in classifier]
    given = [name for name in of_classifier if name in weights]
    misshapen = [name for name in given if weights[name].shape != wanted[name].shape]
    is_missing = of_classifier and not given
    if is_missing or (misshapen and _differ_in_classes(weights, wanted, misshapen)):
        what = f"is not in {path}"
        if misshapen:
            saved_classes, classes = (s[misshapen[0]].shape[0] for s in (weights, wanted))
            what = f"is for {saved_classes} classes in {path} and {classes} here"
        notes.append(f"{key}: the classifier {', '.join(classifier)} {what}: it starts anew")
        weights = {name: value for name, value in weights.items() if name not in of_classifier}
    return weights, notes


def fitted(
    state: Mapping[str, Tensor], model: nn.Module, channels: int, path: str
) -> tuple[State, list[str]]:
    """`state` as `adapted` does it, once it is known to be of this model.

    Raises UsageError naming the tensors that are missing, unknown to `model` or of another shape.
    """
    weights, notes = adapted(state, model, channels, path, "init.weights")
    classifier = classifier_of(model)
    left_out = not any(name.rpartition(".")[0] in classifier for name in weights)
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        if not (left_out and name.rpartition(".")[0] in classifier)
    }
    misshapen = [n for n in wanted if n in weights and weights[n].shape != wanted[n].shape]
    # Older versions of PyTorch saved none, and nothing depends on it.
    missing = [n for n in wanted if n not in weights and not n.endswith("num_batches_tracked")]
    foreign = [n for n in weights if n not in wanted]
    if missing or foreign or misshapen:
        raise UsageError(
            f"init.weights: {path} is not of this model: "
            + "; ".join(
                [
                    *_named("it lacks", missing),
                    *_named("unknown to the model:", foreign),
                    *[
                        f"{n} is {_shape(weights[n])} there and {_shape(wanted[n])} here"
                        for n in misshapen
                    ],
                ][:3]
            )
            + "; give weights of the same model.name and model.kwargs"
        )
    return weights, notes


def live_connections(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """Which weights of `state` are not 0, by name, of every tensor that can hold connections."""
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return {name: state[name] != 0 for name in names if name in state}


def check_masks(
    state: Mapping[str, Tensor], model: nn.Module, channels: int, path: str
) -> tuple[State, list[str]]:
    """The live connections of `state`, and what is to be said; those of a classifier for other
    classes are missing.

    Raises UsageError naming a tensor that is missing or of another shape.
    """
    # Marks of 0 and 1 instead of weights: two live weights may sum to 0.
    marks = {name: (value != 0).float() for name, value in state.items()}
    marks, notes = adapted(marks, model, channels, path, "init.masks")
    classifier = classifier_of(model)
    left_out = not any(name.rpartition(".")[0] in classifier for name in marks)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (left_out and name.rpartition(".")[0] in classifier):
            continue
        if name not in marks or marks[name].shape != parameter.shape:
            shape = _shape(marks[name]) if name in marks else "missing"
            raise UsageError(
                f"init.masks: {path} does not fit this model: {name} is {shape} there and "
                f"{_shape(parameter)} here"
            )
    return live_connections(marks, model), notes


def first_convolutions_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that see the images: as timm says, or the first convolution."""
    if names := named_by_timm(model, "first_conv"):
        return names
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return tuple(layers[:1])


def _differ_in_classes(weights: State, wanted: Mapping[str, Tensor], misshapen: list[str]) -> bool:
    """Whether the classifier differs in its number of outputs alone."""
    return all(weights[name].shape[1:] == wanted[name].shape[1:] for name in misshapen)


def _for_channels(weight: Tensor, wanted: tuple[int, ...], channels: int) -> Tensor | None:
    """The weight of a first convolution for other `channels`, as timm's `adapt_input_conv`.

    Summed over its channels for grey images, else repeated and scaled, so that outputs keep their
    size. None where the shapes differ in something else.
    """
    outputs, inputs, *kernel = weight.shape
    places, left = divmod(wanted[1], channels) if len(wanted) == 4 else (0, 1)
    same = len(wanted) == weight.ndim and (outputs, *kernel) == (wanted[0], *wanted[2:])
    if not same or left or not places or inputs % places:
        return None
    # A stem that folds pixels into channels has the image's channels several times: `places` times.
    base = inputs // places
    by_channel = weight.float().reshape(outputs, places, base, *kernel)
    if channels == 1:
        converted = by_channel.sum(2, keepdim=True)
    else:
        converted = by_channel.repeat(1, 1, -(-channels // base), 1, 1)[:, :, :channels]
        converted = converted * (base / channels)
    return converted.reshape(wanted).to(weight.dtype)


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers whose outputs are the classes: as timm says, or the last Linear."""
    if names := named_by_timm(model, "classifier"):
        return names
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(linear[-1:])


def named_by_timm(model: nn.Module, key: str) -> tuple[str, ...]:
    """The names of the layers that timm's configuration of `model` has under `key`, if any."""
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = known.get(key) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}"]


def _shape(tensor: Tensor | torch.nn.Parameter) -> str:
    return "×".join(map(str, tensor.shape))
