"""Command-line arguments that several programs have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """What to train: a recipe, and overrides of single keys."""
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file, see recipes/")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--set`, as `options.overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="override one key of the recipe; may be repeated",
    )
