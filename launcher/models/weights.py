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


def fitted(state: Mapping[str, Tensor], model: nn.Module, path: str, notes: list[str]) -> State:
    """`state`, without the classifier where that is for other classes, which `notes` then say.

    Raises UsageError naming the tensors that are missing, unknown to `model` or of another shape.
    """
    wanted = model.state_dict()
    classifier = classifier_of(model)
    own = {name for name in wanted if name.rpartition(".")[0] in classifier}
    odd = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if odd and own and set(odd) <= own:
        there, here = (next(iter(s[n] for n in odd)).shape[0] for s in (state, wanted))
        notes.append(
            f"init.weights: the classifier {', '.join(classifier)} is for {there} classes in "
            f"{path} and {here} here: it starts anew"
        )
        state = {name: value for name, value in state.items() if name not in own}
        wanted = {name: value for name, value in wanted.items() if name not in own}
        odd = []
    # Older versions of PyTorch saved none, and nothing depends on it.
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    foreign = [n for n in state if n not in wanted]
    if missing or foreign or odd:
        raise UsageError(
            f"init.weights: {path} is not of this model: "
            + "; ".join(
                [
                    *_named("it lacks", missing),
                    *_named("unknown to the model:", foreign),
                    *[f"{n} is {_shape(state[n])} there and {_shape(wanted[n])} here" for n in odd],
                ][:3]
            )
            + "; give weights of the same model.name and model.kwargs"
        )
    return dict(state)


def check_masks(state: Mapping[str, Tensor], model: nn.Module, path: str) -> State:
    """Which weights are not 0, by name, for every tensor that can hold connections.

    Raises UsageError naming a tensor that is missing or of another shape.
    """
    live = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if name not in state or state[name].shape != parameter.shape:
            there = _shape(state[name]) if name in state else "missing"
            raise UsageError(
                f"init.masks: {path} does not fit this model: {name} is {there} there and "
                f"{_shape(parameter)} here"
            )
        live[name] = state[name] != 0
    return live


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers whose outputs are the classes: as timm says, or the last Linear."""
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = known.get("classifier")
    if names:
        return (names,) if isinstance(names, str) else tuple(names)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(linear[-1:])


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}"]


def _shape(tensor: Tensor | torch.nn.Parameter) -> str:
    return "×".join(map(str, tensor.shape))
