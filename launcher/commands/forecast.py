"""`scl forecast`."""

from __future__ import annotations

import argparse

from launcher.arguments import add_recipe_options
from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
Trains the recipe in a quarter of its epochs until masks freeze, on one rank, and leaves no file.
How far off it was where that was measured: docs/lambda.md. To end at a density instead of choosing
λ: --set method.target_density=0.05 in `scl train`.

example:
  scl forecast --recipe recipes/digits_scl.yaml --lam 0.1 0.2 0.4"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "forecast", _forecast, SUMMARIES["forecast"], _MORE)
    add_recipe_options(parser)
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+",
        metavar="λ",
        help="which λ (default: a quarter to four times the recipe's)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.25,
        help="the share of the epochs to train in (default: 0.25)",
    )


def _forecast(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError
    from launcher.recipe.load import load_recipe
    from launcher.terminal import importing

    if not 0 < options.share < 1:
        raise UsageError(f"--share is {options.share}; it must lie between 0 and 1")
    if options.lam and min(options.lam) < 0:
        raise UsageError(f"--lam {min(options.lam):g}: λ is 0 or more")
    recipe = load_recipe(options.recipe, options.overrides)

    # Not before the recipe is known to be sound: it imports torch, which takes seconds.
    with importing("PyTorch"):
        from launcher.start.forecast import as_table, forecast_recipe

    print("\n".join(as_table(forecast_recipe(recipe, options.lam, options.share))))
    return 0
