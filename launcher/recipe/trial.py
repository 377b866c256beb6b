"""A recipe that W&B's agent runs: a trial of its sweep, among others of the same command."""

from __future__ import annotations

import os

from launcher.recipe.recipe import Recipe


def as_trial(recipe: Recipe) -> Recipe:
    """`recipe` with a folder of its own, if `wandb agent` has started this process; else as it is.

    runs/digits_scl becomes runs/digits_scl-SWEEP/TRIAL, by the ids that the agent gives: a trial
    that it starts again goes on in its folder.
    """
    sweep, trial = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    folder = recipe.folder
    if not sweep or not trial or folder.name == trial:
        return recipe
    return recipe.model_copy(update={"run_dir": folder.with_name(f"{folder.name}-{sweep}") / trial})
