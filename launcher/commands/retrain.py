"""`scl retrain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.arguments import add_overrides
from launcher.commands import SUMMARIES, Commands, add_command


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "retrain",
        _retrain,
        SUMMARIES["retrain"],
        "Writes an ordinary run folder beside RUN (RUN-initial, RUN-new, RUN-final), whose recipe\n"
        "says where the structure came from. Run again, the same command continues.\n\n"
        "example:\n  scl retrain runs/digits_scl --weights initial",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/digits_scl")
    parser.add_argument(
        "--weights",
        required=True,
        choices=("initial", "new", "final"),
        help="those the run began with (made again and verified), of another seed, or its last",
    )
    parser.add_argument("--seed", type=int, help="seed of order, augmentation and new weights")
    parser.add_argument("--ranks", type=int, help="short for --set engine.ranks=N")
    add_overrides(parser)


def _retrain(options: argparse.Namespace) -> int:
    from launcher.folder.needed import check_run

    # Before torch is imported, which takes seconds.
    check_run(options.run, "recipe.yaml", "model.safetensors")

    from launcher.terminal import importing

    with importing("PyTorch"):
        from launcher.start.retrain import retrain_recipe
        from launcher.start.train import train

    overrides = list(options.overrides)
    if options.ranks is not None:
        overrides.append(f"engine.ranks={options.ranks}")
    return train(retrain_recipe(options.run, options.weights, options.seed, overrides))
