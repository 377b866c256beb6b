"""`scl train`: a recipe trained on the ranks of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.cluster.process import end_process
from launcher.cluster.world import find_world
from launcher.recipe.recipe import Recipe
from launcher.reports import report
from launcher.run.prepare import prepare
from launcher.run.rank import run_rank
from launcher.run.spawn import train_on_ranks
from launcher.terminal import Waiting, say


def train(recipe: Recipe, changing: Sequence[str] = ()) -> int:
    """Train `recipe`, or go on with it, to the end; returns the exit code.

    `changing` are the keys of which the run so far may have had other values.

    As a rank that somebody else has started, this process is that rank, and ends with it.
    """
    world = find_world()
    if world.is_rank_of(recipe.engine.ranks):
        end_process(
            run_rank(
                world,
                lambda: prepare(recipe, world.world_size, is_main=world.is_main, changing=changing),
            )
        )
    with Waiting("checking the data and the model"):
        prepared = prepare(recipe, recipe.engine.ranks, changing=changing)
    if prepared.is_finished:
        say(
            f"{recipe.folder} is finished; choose another folder with --set run_dir=… to train "
            "again, or train it longer with --continue-with optim.epochs=…"
        )
        report.show(recipe.folder)
        return 0
    return train_on_ranks(prepared)
