"""`scl train`."""

from __future__ import annotations

import argparse

from launcher.arguments import add_recipe_options
from launcher.commands import Commands, add_command
from launcher.terminal import say


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a recipe, on as many ranks of this machine as asked",
        "Run again, the same command continues from the newest checkpoint.",
    )
    add_recipe_options(parser)
    parser.add_argument("--ranks", type=int, help="short for --set engine.ranks=N")


def _train(options: argparse.Namespace) -> int:
    from launcher import report
    from launcher.cluster import find_world
    from launcher.finish import is_finished
    from launcher.preflight import find_start, open_inputs
    from launcher.recipe import load_recipe
    from launcher.spawn import train_on_ranks
    from launcher.train import main as rank_main

    overrides = list(options.overrides)
    if options.ranks is not None:
        overrides.append(f"engine.ranks={options.ranks}")
    recipe = load_recipe(options.recipe, overrides)
    passed_on = ["--recipe", str(options.recipe)]
    for override in overrides:
        passed_on += ["--set", override]
    if find_world().source != "single process":
        return rank_main(passed_on)
    inputs = open_inputs(recipe, recipe.engine.ranks)
    start = find_start(recipe, inputs.manifest)
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
