"""`scl recipe`."""

from __future__ import annotations

import argparse

from launcher.commands import SUMMARIES, Commands, add_command


def add(commands: Commands) -> None:
    add_command(
        commands,
        "recipe",
        _recipe,
        SUMMARIES["recipe"],
        "example:\n  scl recipe | less",
    )


def _recipe(options: argparse.Namespace) -> int:
    from launcher.recipe.describe import describe

    print(describe())
    return 0
