"""`scl train`."""

from __future__ import annotations

import argparse

from launcher.arguments import add_recipe_options
from launcher.commands import Commands, add_command


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
    from launcher.start.train import start_run

    return start_run(options.recipe, list(options.overrides), options.ranks)
