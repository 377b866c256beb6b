"""A smaller network as a folder: model, cut, a recipe to fine-tune it; read back and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from data.files import atomic_write, new_folder
from launcher.errors import RunError
from launcher.export.formats import macs_of
from launcher.export.source import Network, Source, open_source
from launcher.recipe.load import build_recipe
from launcher.recipe.model import CUT_FILE
from launcher.recipe.recipe import Recipe
from launcher.shrink.asked import REPORT, Asked
from launcher.start.retrain import fixed_masks
from sclcore.export import save_sparse_model
from sclcore.export.cut import Cut
from sclcore.network.connections import find_connections

MODEL = "model.safetensors"
# A network with fewer of its weights live is sparse: its zeros are kept.
_DENSE = 0.99
# The same weights in the same order of sums: rounding is equal but for the memory they lie in.
_ROUNDING = 1e-5


def write_network(
    folder: Path,
    model: nn.Module,
    network: Network,
    recipe: Recipe | None,
    report: Mapping[str, Any],
    images: Tensor,
) -> None:
    """Write `folder`, which appears when its model has been read back and computes the same.

    `network` has the cut of `model`; `recipe` fine-tunes it. Raises RunError.
    """
    assert network.cut is not None
    with new_folder(folder) as staging:
        about = network.as_dict() | {"cut": network.cut.model_dump(mode="json")}
        save_sparse_model(model, staging / MODEL, metadata=about)
        (staging / CUT_FILE).write_text(network.cut.model_dump_json() + "\n", encoding="utf-8")
        if recipe is not None:
            text = yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)
            (staging / "recipe.yaml").write_text(text, encoding="utf-8")
        (staging / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _compare(staging, model, images)


def note(folder: Path, report: Mapping[str, Any]) -> None:
    """Replace the report of `folder`."""
    atomic_write(folder / REPORT, json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def _compare(folder: Path, model: nn.Module, images: Tensor) -> None:
    expected, found = model(images), open_source(folder).model(images)
    if not torch.allclose(expected, found, rtol=_ROUNDING, atol=_ROUNDING):
        raise RunError(
            f"what was written computes something else than the network it is of (by "
            f"{float((expected - found).abs().max()):.1e}): an error of ours; nothing was kept"
        )


def fine_tuning(source: Source, folder: Path, cut: Cut, asked: Asked) -> Recipe | None:
    """The recipe of `source` that trains the network in `folder`; None where it has none.

    Zeros of a sparse network stay, as under `scl retrain`. Raises UsageError from its overrides.
    """
    if source.recipe is None:
        return None
    values = json.loads(json.dumps(dict(source.recipe)))
    name = f"{values['name']}-smaller"
    values |= {"name": name, "run_dir": str(folder / "run")}
    values["model"]["cut"] = str(folder / CUT_FILE)
    values["init"] = {"weights": str(folder / MODEL)}
    values.setdefault("checkpoint", {})["resume"] = "auto"
    if asked.data is not None:
        values["data"]["path"] = asked.data
    if asked.epochs:
        values["optim"]["epochs"] = asked.epochs
    if values["method"]["name"] != "dense":
        sparse = _density(source.model) < _DENSE
        values["method"] = fixed_masks(values) if sparse else {"name": "dense"}
        if sparse:
            values.setdefault("schedule", {})["freeze_masks_at"] = 0.0
    overrides = ["engine.ranks=1", *asked.overrides]
    return build_recipe(values, overrides, str(source.file))


def _density(model: nn.Module) -> float:
    tensors = [c.parameter for c in find_connections(model)]
    live = sum(int(torch.count_nonzero(p)) for p in tensors)
    return live / max(1, sum(p.numel() for p in tensors))


def size_of(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Parameters, and MACs of one sample."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs_of(model, example),
    }
