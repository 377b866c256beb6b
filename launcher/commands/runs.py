"""`scl eval | report | recipe`: what there is to see of runs and recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import Commands, add_command


def add(commands: Commands) -> None:
    """Add the three subcommands."""
    _add_eval(commands)
    _add_report(commands)
    _add_recipe(commands)


def _add_eval(commands: Commands) -> None:
    parser = add_command(commands, "eval", _eval, "evaluate the written model of a run")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    parser.add_argument("--data", help="shards to use instead of the recipe's data.path")


def _add_report(commands: Commands) -> None:
    parser = add_command(commands, "report", _report, "draw the picture of a run, show its table")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")


def _add_recipe(commands: Commands) -> None:
    add_command(commands, "recipe", _recipe, "list every key of a recipe with default and meaning")


def _eval(options: argparse.Namespace) -> int:
    from launcher.evaluate import evaluate_run

    for key, value in evaluate_run(options.run, options.split, options.data).items():
        print(f"{key:<12} {value:.6g}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from launcher import picture, report

    print(picture.draw(options.run))
    report.show(options.run)
    return 0


def _recipe(options: argparse.Namespace) -> int:
    from launcher.recipe import describe

    print(describe())
    return 0
