"""`scl train`."""

from __future__ import annotations

import argparse
import contextlib

from launcher.arguments import add_continue_with, add_recipe_options, changing
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
        "  scl train --recipe recipes/digits_scl.yaml --dry-run\n"
        "  scl train --recipe recipes/digits_scl.yaml --continue-with optim.epochs=120\n"
        "  scl recipe                       every key that --set takes\n\n"
        "On several machines: deepspeed --hostfile HOSTS --no_local_rank launcher/train.py …",
    )
    add_recipe_options(parser)
    add_continue_with(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="short for --set engine.ranks=N")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, say what would be done and what memory it takes; train nothing and "
        "write nothing",
    )
    parser.add_argument(
        "--forecast",
        action="store_true",
        help="with --dry-run: train a part in memory, to foretell the density of each λ",
    )


def _train(options: argparse.Namespace) -> int:
    from launcher.cluster.world import find_world
    from launcher.errors import UsageError
    from launcher.recipe.load import load_recipe
    from launcher.recipe.trial import as_trial
    from launcher.terminal import Waiting, say

    if options.forecast and not options.dry_run:
        raise UsageError("--forecast goes with --dry-run; alone, it is `scl forecast`")
    ranks = [] if options.ranks is None else [f"engine.ranks={options.ranks}"]
    settings = [*options.overrides, *ranks, *options.continue_with]
    recipe = as_trial(load_recipe(options.recipe, settings))
    is_main = find_world().is_main
    if is_main:
        say(f"{recipe.name}: checking the data and the model")

    # Not before the recipe is known to be sound: it imports torch, which takes seconds.
    with Waiting("importing PyTorch") if is_main else contextlib.nullcontext():
        from launcher.start.train import train

    if options.dry_run:
        from launcher.start.dry_run import dry_run

        print(dry_run(recipe, changing(options), forecast=options.forecast))
        return 0
    return train(recipe, changing(options))
