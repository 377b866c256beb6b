"""`model.cut`: the file that says which features of a model are kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from torch import nn

from launcher.errors import UsageError
from launcher.recipe.model import CUT_FILE, ModelConfig
from sclcore.export import ExportError
from sclcore.export.cut import Cut
from sclcore.export.cutting import apply_cut, inputs_of_layers, keep_variance


def read_cut(path: Path) -> Cut:
    """The cut in the file `path`. Raises UsageError with one sentence."""
    try:
        return Cut.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"model.cut: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"model.cut: {path} is no cut: {where}: {reason}; give a cut.json that `scl shrink` "
            "has written"
        ) from error


def cut_in(folder: Path | None, config: ModelConfig) -> Cut | None:
    """The cut of the network in `folder`: its own copy, or else the file that `config` names."""
    if folder is not None and (folder / CUT_FILE).is_file():
        return read_cut(folder / CUT_FILE)
    return read_cut(config.cut) if config.cut is not None else None


def make_smaller(model: nn.Module, cut: Cut, config: ModelConfig) -> None:
    """Apply `cut` to `model`, in place; random weights keep the variance of what they feed.

    Raises UsageError where the cut is of another model.
    """
    named = f"model.cut: {config.cut}" if config.cut is not None else "the cut"
    if cut.model and cut.model != config.name:
        raise UsageError(
            f"{named} is of the model {cut.model}, not of {config.name}: set model.name="
            f"{cut.model}, or leave model.cut out"
        )
    before = inputs_of_layers(model)
    try:
        apply_cut(model, cut)
    except ExportError as error:
        raise UsageError(
            f"{named} does not fit {config.name} with kwargs {config.kwargs}: {error}; give the "
            "kwargs and the data.image_size of the network that it was made of"
        ) from error
    # Published weights are not random: they stay as they were trained.
    if not config.kwargs.get("pretrained"):
        keep_variance(model, before)
