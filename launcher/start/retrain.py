"""`scl retrain`: the structure that a run found, with its weights trained anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UsageError
from launcher.folder.needed import check_run
from launcher.recipe.load import build_recipe, load_recipe
from launcher.recipe.recipe import Recipe, resume_difference
from launcher.run.initial import hash_weights, initial_model, read_initial
from launcher.run.inputs import open_inputs

Weights = Literal["initial", "new", "final"]


def retrain_recipe(
    run: Path, weights: Weights, seed: int | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe of `run` with its masks fixed from the start and other weights to begin with.

    `initial`: those it began with itself, which are made again and compared with the hash that the
    run noted; `new`: from another seed; `final`: those it ended with. `seed` decides order and
    augmentation as well; without it they are the run's own, or for `new` those of the next seed.

    Raises UsageError where the run has no structure to keep, or its weights cannot be had again.
    """
    check_run(run, "recipe.yaml", "model.safetensors")
    source = load_recipe(run / "recipe.yaml")
    if source.method.name == "dense":
        raise UsageError(f"{run} is a dense network: it has no structure that could be trained")
    values = source.as_dict()
    suffix = f"-{weights}" + (f"-seed{seed}" if seed is not None else "")
    init: dict[str, Any] = {"masks": str(run)}
    if weights == "initial":
        weights_seed = source.seed if source.init.seed is None else source.init.seed
        new_seed = source.seed if seed is None else seed
        init |= {
            "weights": source.init.weights,
            "seed": weights_seed if weights_seed != new_seed else None,
        }
        _check_initial_weights(run, source)
    elif weights == "final":
        init |= {"weights": str(run)}
    elif seed is None:
        seed = source.seed + 1
    if seed is not None:
        values["seed"] = seed
    values["method"] = fixed_masks(values)
    values["schedule"]["freeze_masks_at"] = 0.0
    values["init"] = init
    values["name"] = f"{source.name}{suffix}"
    values["run_dir"] = str(run.parent / f"{run.resolve().name}{suffix}")
    values["checkpoint"]["resume"] = "auto"
    recipe = build_recipe(values, overrides, str(run / "recipe.yaml"))
    _check_folder(recipe)
    return recipe


def fixed_masks(values: Mapping[str, Any]) -> dict[str, Any]:
    """The method that trains the live weights of a recipe's network, whose masks stay."""
    # Nothing else of a method acts while masks are fixed, and no layer may get a connection back.
    return {
        "name": "scl",
        "lam": 0.0,
        "min_connections": 0,
        "exclude": values["method"].get("exclude", []),
    }


def _check_initial_weights(run: Path, source: Recipe) -> None:
    path = run / "origin.json"
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read, which says what weights the run began with: train the run "
            "again, or choose --weights new or final"
        ) from error
    manifest = open_inputs(source, source.engine.ranks).manifest
    made = hash_weights(initial_model(source, manifest, read_initial(source, manifest)))
    if made != origin["initial_weights_hash"]:
        raise UsageError(
            f"the weights that {run} began with cannot be made again here (their hash differs; "
            f"PyTorch was {origin['torch']} and is {version('torch')}): use the same version and "
            "the same init.weights, or choose --weights new or final"
        )


def _check_folder(recipe: Recipe) -> None:
    """Refuse to put this recipe where another run is."""
    path = recipe.folder / "recipe.yaml"
    if path.exists() and (difference := resume_difference(load_recipe(path).as_dict(), recipe)):
        raise UsageError(
            f"{recipe.folder} is another run's: {difference}; choose another folder with "
            "--set run_dir=…"
        )
