"""`scl train`."""

from __future__ import annotations

import argparse

from launcher.arguments import add_recipe_options
from launcher.commands import SUMMARIES, Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        SUMMARIES["train"],
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
    from launcher.cluster.world import find_world
    from launcher.recipe.load import load_recipe
    from launcher.recipe.trial import as_trial
    from launcher.terminal import say

    ranks = [] if options.ranks is None else [f"engine.ranks={options.ranks}"]
    recipe = as_trial(load_recipe(options.recipe, [*options.overrides, *ranks]))
    if find_world().is_main:
        say(f"{recipe.name}: checking the data and the model")

    # Not before the recipe is known to be sound: it imports torch, which takes seconds.
    from launcher.start.train import train

    return train(recipe)
