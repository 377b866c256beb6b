"""`scl train`: a recipe trained on the ranks of this machine."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster.world import find_world
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.reports import report
from launcher.run.prepare import prepare
from launcher.run.rank import end_process, run_rank
from launcher.run.spawn import train_on_ranks
from launcher.terminal import say


def start_run(path: Path, overrides: list[str], ranks: int | None) -> int:
    """Train the recipe `path`, or go on with it, to the end; returns the exit code.

    As a rank that somebody else has started, this process is that rank, and ends with it.
    """
    if ranks is not None:
        overrides = [*overrides, f"engine.ranks={ranks}"]
    return train(load_recipe(path, overrides))


def train(recipe: Recipe) -> int:
    world = find_world()
    if world.is_rank_of(recipe.engine.ranks):
        end_process(
            run_rank(world, lambda: prepare(recipe, world.world_size, is_main=world.is_main))
        )
    prepared = prepare(recipe, recipe.engine.ranks)
    if prepared.is_finished:
        say(
            f"{recipe.folder} is finished; choose another folder with --set run_dir=… to train "
            "again"
        )
        report.show(recipe.folder)
        return 0
    return train_on_ranks(prepared)
