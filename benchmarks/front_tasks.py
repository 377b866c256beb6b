"""What `benchmarks.front` trains: its tasks, and the settings of each method for a density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.front_data import packed
from benchmarks.front_training import Images
from docs.figures.split_training import split
from launcher.errors import UsageError
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from sclcore.registry import find_method

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DENSITIES = (0.1, 0.05, 0.025, 0.01)
# The dense network has none, and SCL is steered to it.
_FREE = ("dense", "scl")
# What an override such as scl.schedule.mask_lr=cosine reaches beside the method's own settings.
_SECTIONS = ("schedule", "optim", "model", "init")


@dataclass(frozen=True)
class Task:
    """A set of images, and the recipe in which only the method changes.

    `images` gives split k, or with fixed splits the same images for every k: then k is a seed.
    `knobs` are settings of methods that know no density, by method and density; `epochs` are
    those of the recipe, or given, so that some hundred runs end in a day on two cores.
    """

    recipe: Path
    images: Callable[[int], Images]
    knobs: Mapping[str, Mapping[float, Mapping[str, Any]]]
    epochs: int | None = None


def _glyphs(recipe: str, epochs: int | None = None) -> Task:
    path = _RECIPES / "glyphs" / recipe
    return Task(path, lambda split: packed(path), {}, epochs)


TASKS: dict[str, Task] = {
    "digits": Task(
        _RECIPES / "compare_digits" / "digits.yaml",
        split,
        {
            "str": {
                0.1: {"s_weight_decay": 0.02},
                0.05: {"s_weight_decay": 0.066},
                0.025: {"s_weight_decay": 0.122},
                0.01: {"s_weight_decay": 0.152},
            }
        },
    ),
    "glyphs_lenet": _glyphs("lenet5.yaml", epochs=12),
    "glyphs_resnet": _glyphs("resnet20.yaml"),
    "glyphs_vit": _glyphs("vit.yaml"),
}

# The less is left of a layer under a norm, the larger its gradients.
_CLIPPED = {"optim.clip_grad_norm": 3}
# What a method is called here, and its settings on all tasks and at all densities. What is not here
# is the default; docs/comparison.md says how each was chosen.
METHODS: dict[str, dict[str, Any]] = {
    # Others have an end of their own, or none.
    "scl": {"name": "scl", "schedule.freeze_masks_at": 0.7},
    "dense": {"name": "dense"},
    "magnitude": {"name": "magnitude"},
    "rigl": {"name": "rigl", "every": 20, "optim.clip_grad_norm": 1},
    "str": {"name": "str", "s_init": -5},
    "feather": {"name": "feather", "theta": 1, **_CLIPPED},
    "st3": {"name": "feather", "power": 1, "theta": 1, "rescale": "true", **_CLIPPED},
    "optg": {"name": "optg", "steepness": 40, "optim.clip_grad_norm": 1},
    "acdc": {"name": "acdc"},
}


def methods_of(task: str) -> list[str]:
    """The methods that a task has settings for."""
    knows = TASKS[task].knobs
    return [name for name in METHODS if name in knows or name in _FREE or _takes_density(name)]


def _takes_density(method: str) -> bool:
    return "density" in find_method(METHODS[method]["name"]).model_fields


def densities_of(method: str, wanted: list[float]) -> list[float]:
    """Those of `wanted` that a method is trained at: the dense network has one of its own."""
    return [1.0] if method == "dense" else wanted


def recipe_for(task: str, method: str, density: float, overrides: list[str]) -> Recipe:
    """The recipe of a run; `overrides` such as mask_lr=0.002, for the method or a section.

    Raises UsageError where a setting is refused or the task has no knob for the density.
    """
    settings = METHODS[method] | _sparsity(task, method, density)
    if TASKS[task].epochs is not None:
        settings |= {"optim.epochs": TASKS[task].epochs}
    written = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    keys = [text if _is_of_section(text) else f"method.{text}" for text in written]
    return load_recipe(TASKS[task].recipe, keys)


def _is_of_section(override: str) -> bool:
    return override.split(".")[0] in _SECTIONS


def _sparsity(task: str, method: str, density: float) -> dict[str, Any]:
    if method == "dense":
        return {}
    if method == "scl":
        return {"lam": "null", "target_density": density}
    if _takes_density(method):
        return {"density": density}
    known = TASKS[task].knobs.get(method, {})
    if density not in known:
        raise UsageError(
            f"{method} cannot be asked for a density, and {task} has no setting of its own for "
            f"{100 * density:g} %: leave it out of --methods, or give one of "
            f"{', '.join(f'{100 * d:g}' for d in known) or 'no densities'} to --densities"
        )
    return dict(known[density])
