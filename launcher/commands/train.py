"""`scl train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.arguments import add_recipe_options
from launcher.commands import Commands, add_command
from launcher.terminal import say


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a recipe, on as many ranks of this machine as asked",
        "Run again, the same command continues from the newest checkpoint.\n\n"
        "examples:\n"
        "  scl train --recipe recipes/digits_scl.yaml\n"
        "  scl train --recipe recipes/digits_scl.yaml --ranks 1 --set method.lam=0.2\n"
        "  scl recipe                       every key that --set takes\n\n"
        "On several machines: deepspeed --hostfile HOSTS --no_local_rank launcher/train.py …",
    )
    add_recipe_options(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="short for --set engine.ranks=N")


def _train(options: argparse.Namespace) -> int:
    return start_run(options.recipe, list(options.overrides), options.ranks)


def start_run(path: Path, overrides: list[str], ranks: int | None) -> int:
    """Train the recipe `path`, or go on with it, to the end; returns the exit code."""
    from launcher.cluster.spawn import train_on_ranks
    from launcher.cluster.world import find_world
    from launcher.finish import is_finished
    from launcher.init import read_initial
    from launcher.preflight import find_start, open_inputs
    from launcher.recipe import load_recipe
    from launcher.reports import report
    from launcher.train import main as rank_main

    if ranks is not None:
        overrides = [*overrides, f"engine.ranks={ranks}"]
    recipe = load_recipe(path, overrides)
    passed_on = ["--recipe", str(path)]
    for override in overrides:
        passed_on += ["--set", override]
    if find_world().source != "single process":
        return rank_main(passed_on)
    inputs = open_inputs(recipe, recipe.engine.ranks)
    start = find_start(recipe, inputs.manifest)
    if start is None:
        read_initial(recipe, inputs.manifest)
    steps = inputs.plan(recipe, recipe.engine.ranks, 0).steps_per_epoch * recipe.optim.epochs
    if start is not None and start.step >= steps and is_finished(recipe.folder):
        say(
            f"{recipe.folder} is finished; choose another folder with --set run_dir=… to train "
            "again"
        )
        report.show(recipe.folder)
        return 0
    if recipe.engine.ranks == 1:
        return rank_main(passed_on)
    return train_on_ranks(recipe.engine.ranks, passed_on)
