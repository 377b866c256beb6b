"""What is exported: a network, how to build it anew, and where it comes from."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.errors import DataError
from data.stream.pipeline import DataConfig, ShardDataset, open_split
from launcher.checkpoints import checkpoint
from launcher.errors import UsageError
from launcher.export.asked import WHAT, check_source
from launcher.folder.results import read_run
from launcher.models import create_model
from launcher.models.cut import cut_in
from launcher.models.weights import classifier_of
from launcher.recipe.model import ModelConfig
from sclcore.export import ExportError, load_compact, load_huffman
from sclcore.export.compact import read_header
from sclcore.export.cut import Cut
from sclcore.export.huffman.file import read_huffman_header

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """How to build the model: everything that its name leaves open."""

    config: ModelConfig
    num_classes: int
    in_chans: int
    image_size: int
    cut: Cut | None = None

    def build(self) -> nn.Module:
        return create_model(
            self.config, num_classes=self.num_classes, in_chans=self.in_chans, cut=self.cut
        )

    def example(self, batch: int) -> Tensor:
        """Zeros [batch, channels, height, width]."""
        return torch.zeros(batch, self.in_chans, self.image_size, self.image_size)

    def as_dict(self) -> dict[str, Any]:
        """What reports say of the model; with the cut, `open_source` builds it from that."""
        return {
            "model": self.config.name,
            "kwargs": self.config.kwargs,
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "image_size": self.image_size,
        }


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode, on the CPU, with what is known of it.

    `file` is what was read. `run` is the folder of its run and `recipe` that run's plain values,
    where there are any; `step` and `finished` say how far it was trained. `live` is what a finished
    run wrote of its connections, by layer.
    """

    file: Path
    model: nn.Module
    network: Network
    run: Path | None = None
    recipe: Mapping[str, Any] | None = None
    step: int | None = None
    finished: bool = True
    live: Mapping[str, int] | None = None

    def validation_set(self, data: str | None = None) -> tuple[ShardDataset, DataConfig] | None:
        """The validation split that `data` or else the recipe names; None where it is not here.

        Raises UsageError where `data` was given and cannot be used.
        """
        values: dict[str, Any] = {"image_size": self.network.image_size}
        values |= (self.recipe or {}).get("data") or {}
        path = data or values.get("path")
        if path is None or (data is None and not Path(path).is_dir()):
            return None
        try:
            config = DataConfig.model_validate(values | {"path": path})
            return open_split(config, "val"), config
        except (ValidationError, DataError) as error:
            if data is None:
                return None
            raise UsageError(f"--data {data} cannot be read: {error}") from error


@dataclass(frozen=True)
class Described:
    """What the user says of a file that says nothing of itself."""

    model: str | None = None
    kwargs: Mapping[str, Any] | None = None
    image_size: int | None = None


def open_source(path: Path, said: Described | None = None) -> Source:
    """The network at `path`. Raises UsageError in one sentence, CheckpointError from checkpoints.

    A run that has written no model yet gives that of its newest checkpoint.
    """
    said = said or Described()
    check_source(path)
    if path.is_file():
        return _of_file(path, said)
    if (path / "manifest.json").is_file():
        return _of_checkpoint(path, said)
    for name in ("model.safetensors", "model.sclc", "model.sham", "model.ham"):
        if (path / name).is_file():
            return _of_file(path / name, said)
    for root in (path / "checkpoints", path):
        if root.is_dir() and checkpoint.folders(root):
            return _of_checkpoint(root, said)
    raise UsageError(f"{path} holds no model and no checkpoint: {WHAT}")


def _of_checkpoint(path: Path, said: Described) -> Source:
    saved = checkpoint.read(path)
    recipe, progress = saved.meta["recipe"], saved.meta["progress"]
    state = checkpoint.load_part(saved, "model")
    run = saved.path.parent.parent
    network, model = _fit(state, _described_by(recipe, run), said, saved.path)
    return Source(
        file=saved.path,
        model=model,
        network=network,
        run=run if (run / "recipe.yaml").is_file() else None,
        recipe=recipe,
        step=saved.step,
        finished=progress.get("stopped_early", False)
        or progress["epochs"] >= recipe["optim"]["epochs"],
    )


def _of_file(path: Path, said: Described) -> Source:
    state, about = _read(path)
    recipe = _recipe_beside(path)
    described = _described_by(recipe, path.parent) if recipe else about
    network, model = _fit(state, described, said, path)
    live = None
    if recipe and (path.parent / "layers.csv").is_file():
        live = {layer.name: layer.live for layer in read_run(path.parent).layers}
    return Source(
        file=path,
        model=model,
        network=network,
        run=path.parent if recipe else None,
        recipe=recipe,
        step=about.get("step"),
        finished=bool(about.get("finished", True)),
        live=live,
    )


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    """The tensors of a file, and what it says of its model."""
    try:
        if path.suffix == ".sclc":
            return load_compact(path), read_header(path)[1]
        if path.suffix in (".ham", ".sham"):
            return load_huffman(path), read_huffman_header(path)[1]
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("scl", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, ExportError, ValueError, OSError, struct.error) as error:
        raise UsageError(f"{path} cannot be read as a model: {error}; {WHAT}") from error


def _recipe_beside(path: Path) -> dict[str, Any] | None:
    recipe = path.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{recipe} cannot be read: {error}") from error
    if not isinstance(values, dict) or not {"model", "data"} <= values.keys():
        raise UsageError(f"{recipe} is no recipe: it lacks model or data")
    return values


def _described_by(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the recipe of the run in `folder` says of its model."""
    model = recipe["model"]
    return {
        "cut": cut_in(folder, ModelConfig(name=model["name"], cut=model.get("cut"))),
        "model": model["name"],
        "kwargs": model.get("kwargs") or {},
        "image_size": recipe["data"].get("image_size"),
    }


def _fit(
    state: State, about: Mapping[str, Any], said: Described, file: Path
) -> tuple[Network, nn.Module]:
    """The network that `about` and `said` name, with the tensors of `state`."""
    name = said.model or about.get("model")
    if name is None:
        raise UsageError(f"{file} does not say of which model it is: name it with --model")
    kwargs = about.get("kwargs") or {}
    if said.model or said.kwargs:
        kwargs = dict(said.kwargs or {})
    config = ModelConfig(name=name, kwargs=kwargs)
    cut = _cut_of(about, file)
    num_classes, in_chans = _classes_and_channels(state, config, cut, file)
    model = create_model(config, num_classes=num_classes, in_chans=in_chans, cut=cut)
    # assign: a file of another precision stays what it is.
    model.load_state_dict(state, assign=True)
    size = said.image_size or about.get("image_size") or _usual_size(model)
    if size is None:
        raise UsageError(f"{file} does not say the size of its images: give it with --image-size")
    network = Network(config, num_classes, in_chans, int(size), cut)
    _check_size(network, model)
    return network, model.eval()


def _cut_of(about: Mapping[str, Any], file: Path) -> Cut | None:
    cut = about.get("cut")
    try:
        return cut if cut is None else Cut.model_validate(cut)
    except ValidationError as error:
        raise UsageError(f"{file} describes no cut that could be read: {WHAT}") from error


def _classes_and_channels(
    state: State, config: ModelConfig, cut: Cut | None, file: Path
) -> tuple[int, int]:
    """Those with which the model has the tensors of `state`, shape by shape."""
    misfits = []
    for in_chans in (3, 1):
        with torch.device("meta"):
            model = create_model(config, num_classes=10, in_chans=in_chans, cut=cut)
            classifier = [f"{name}.weight" for name in classifier_of(model)]
            classes = next((state[n].shape[0] for n in classifier if n in state), 10)
            model = create_model(config, num_classes=classes, in_chans=in_chans, cut=cut)
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        misfit = _misfit({name: value.shape for name, value in state.items()}, wanted)
        if misfit is None:
            return classes, in_chans
        misfits.append(misfit)
    kwargs = f" with {config.kwargs}" if config.kwargs else ""
    raise UsageError(
        f"{file} does not fit {config.name}{kwargs}: {misfits[0]}; name its model with --model and "
        "what that is built with by --kwarg KEY=VALUE"
    )


def _misfit(in_file: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> str | None:
    missing = [name for name in wanted if name not in in_file]
    foreign = [name for name in in_file if name not in wanted]
    for names, what in ((foreign, "the model has no"), (missing, "the file lacks")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{what} {names[0]}{more}"
    for name, shape in in_file.items():
        if shape != wanted[name]:
            return f"{name} is {tuple(shape)} in the file and {tuple(wanted[name])} in the model"
    return None


def _usual_size(model: nn.Module) -> int | None:
    usual = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return usual[-1] if usual else None


def _check_size(network: Network, model: nn.Module) -> None:
    try:
        with torch.no_grad():
            model.eval()(network.example(1).to(next(model.parameters()).dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = network.image_size
        raise UsageError(
            f"{network.config.name} does not take images of {size}×{size} pixels: {error}"
        ) from error
